"""Checkpoints that other programs quantized, read as dense tensors, one at a time: the backbones of other people.

An original in FP8 or MXFP4 is read by `prequantized`. Of a linear (out, in), these are read too:

bitsandbytes, 4 bits, in blocks of b values of the flattened weight (the library's own names):

    X.weight                    uint8 (out · in / 2, 1)     two codes a byte, the first in the high half
    X.weight.quant_map          float32 (16)                the value of each code
    X.weight.absmax             float32 (blocks), or uint8 with nested_absmax, nested_quant_map and nested_offset
    X.weight.quant_state.*      uint8                       JSON with blocksize, dtype, shape, nested_blocksize

bitsandbytes, 8 bits:  W = X.weight (int8) · X.SCB / 127.

GPTQ (`gptq`), versions 1 and 2, with act-order too.

AWQ (`quant_method: awq`, version gemm; arXiv 2306.00978), 4 bits in groups of g inputs:

    X.qweight                   int32 (in, out / 8)         eight codes a word, outputs in the order 0 2 4 6 1 3 5 7
    X.qzeros                    int32 (in / g, out / 8)     zero-points in the same order
    X.scales                    float16 (in / g, out)
    W[o, i] = scale · (code − zero)

compressed-tensors: `given_compressed`. Each view gives the values that its program computes, in the dtype in which it
computes them; those of GPTQ and AWQ in float32, because their kernels differ in what they round.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loftq.core.affine import AffineWeight, scatter
from loftq.core.grid import Grid
from loftq.errors import CheckpointError
from loftq.formats import gptq
from loftq.formats.checkpoint import Checkpoint, TensorSpec
from loftq.formats.given_compressed import compressed_view
from loftq.formats.model_config import FILE
from loftq.formats.prequantized import READABLE, Decoder, DenseView, dense_view

Reader = Callable[[str], torch.Tensor]  # of stored tensors, by name
_STATE = ".quant_state.bitsandbytes__"
_AWQ_BITS, _AWQ_WORD, _AWQ_ORDER = 4, 8, (0, 4, 1, 5, 2, 6, 3, 7)  # where each output of a word lies


def given_view(checkpoint: Checkpoint, quantization: Mapping[str, Any], dtype: torch.dtype, name: str) -> DenseView:
    """A quantized checkpoint as a dense one. Raises CheckpointError for a kind that cannot be read."""
    method = str(quantization.get("quant_method"))
    known = dense_view(checkpoint, quantization, dtype)
    if known is not None:
        return known
    if method not in READERS:
        raise CheckpointError(
            f"{name} is quantized with {method}, which cannot be read: expected {', '.join([*READABLE, *READERS])}"
        )
    return READERS[method](checkpoint, quantization, dtype)


def _bitsandbytes(checkpoint: Checkpoint, quantization: Mapping[str, Any], dtype: torch.dtype) -> DenseView:
    tensors: dict[str, TensorSpec] = {}
    decoded: dict[str, Decoder] = {}
    states = {name.partition(_STATE)[0]: name for name in checkpoint.tensors if _STATE in name}
    for name, spec in checkpoint.tensors.items():
        weight = _owner(name, states)
        scales = f"{name.removesuffix('weight')}SCB"
        if weight is not None and weight != name:
            continue  # a part of the state of another tensor
        if name.endswith((".SCB", ".weight_format")):
            continue
        if weight is not None:
            state = _state_of(checkpoint, states[name])
            tensors[name] = TensorSpec(name, getattr(torch, state["dtype"]), tuple(state["shape"]))
            decoded[name] = partial(_decode_4bit, name, state)
        elif spec.dtype == torch.int8 and scales in checkpoint.tensors:
            tensors[name] = TensorSpec(name, dtype, spec.shape)
            decoded[name] = partial(_decode_8bit, name, scales)
        else:
            tensors[name] = spec
    bits = 4 if states else 8
    title = f"bitsandbytes, {quantization.get('bnb_4bit_quant_type', '4 bits') if bits == 4 else 'int8'}"
    return _view(checkpoint, tensors, decoded, title)


def _owner(name: str, states: Mapping[str, str]) -> str | None:
    """The 4-bit weight that a tensor is, or whose state it is a part of; None for any other tensor."""
    for end in ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"):
        if name.endswith(end) and name.removesuffix(end) in states:
            return name.removesuffix(end)
    return name.partition(_STATE)[0] if _STATE in name else None


def _state_of(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    try:
        state = json.loads(bytes(checkpoint.read(name).flatten().tolist()))
        if not isinstance(getattr(torch, state["dtype"]), torch.dtype) or len(state["shape"]) != 2:
            raise ValueError("expected a dtype of torch and two sides")
        return {**state, "blocksize": int(state["blocksize"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"tensor {name!r} is damaged ({error}): download the checkpoint again") from error


def _decode_4bit(name: str, state: Mapping[str, Any], read: Reader) -> torch.Tensor:
    packed = read(name).view(torch.uint8).view(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)
    scales = read(f"{name}.absmax")
    if "nested_blocksize" in state:
        spread = read(f"{name}.nested_absmax").repeat_interleave(int(state["nested_blocksize"]))[: len(scales)]
        scales = read(f"{name}.nested_quant_map")[scales.long()] * spread + float(state["nested_offset"])
    values = read(f"{name}.quant_map").float()[codes.int()]
    block = int(state["blocksize"])
    spread = scales.float().repeat_interleave(block)[: len(values)]
    return (values * spread).view(tuple(state["shape"]))


def _decode_8bit(name: str, scales: str, read: Reader) -> torch.Tensor:
    return read(name).float() * (read(scales).float() / 127).unsqueeze(1)


def _gptq(checkpoint: Checkpoint, quantization: Mapping[str, Any], _dtype: torch.dtype) -> DenseView:
    grid, less = gptq.read_config(quantization, checkpoint.folder)
    shapes = gptq.shapes_of(checkpoint.tensors)
    parts = ("qweight", "qzeros", "scales", "g_idx")
    decoders = {module: partial(_decode_gptq, module, shape, grid, less) for module, shape in shapes.items()}
    return _packed_view(checkpoint, shapes, parts, decoders, f"GPTQ, {grid.bits} bits")


def _decode_gptq(module: str, shape: tuple[int, int], grid: Grid, less: int, read: Reader) -> torch.Tensor:
    solved = gptq.read(module, shape, grid, read, less)
    groups = gptq.input_groups(module, shape, grid, read)
    if groups is None:
        return grid.decoder(shape[1]).decode(*solved, torch.Size(shape))
    weight = AffineWeight.of(*solved, shape, grid.bits)
    return scatter(weight.codes, weight.scales, weight.shifts, groups, grid.bits)


def _awq(checkpoint: Checkpoint, quantization: Mapping[str, Any], _dtype: torch.dtype) -> DenseView:
    where = f"quantization_config in {checkpoint.folder / FILE}"
    bits = quantization.get("bits", quantization.get("w_bit"))
    version = str(quantization.get("version", "gemm")).lower()
    if bits != _AWQ_BITS or version != "gemm":
        raise CheckpointError(f"{where}: AWQ of {bits} bits, version {version}, cannot be read: expected 4 bits, gemm")
    shapes: dict[str, tuple[int, int]] = {}
    for name, spec in checkpoint.tensors.items():
        module = name.removesuffix(".qweight")
        if module == name:
            continue
        for part in ("qzeros", "scales"):
            if f"{module}.{part}" not in checkpoint.tensors:
                raise CheckpointError(f"tensor {module}.{part} of the AWQ checkpoint is missing: download it again")
        shapes[module] = (spec.shape[1] * _AWQ_WORD, spec.shape[0])
    decoders = {module: partial(_decode_awq, module) for module in shapes}
    return _packed_view(checkpoint, shapes, ("qweight", "qzeros", "scales"), decoders, "AWQ, 4 bits")


def _decode_awq(module: str, read: Reader) -> torch.Tensor:
    codes, zeros = (_unpack_awq(read(f"{module}.{part}")) for part in ("qweight", "qzeros"))
    scales = read(f"{module}.scales").float()  # (groups, out)
    group = len(codes) // len(scales)
    zeros, scales = (part.repeat_interleave(group, dim=0) for part in (zeros, scales))
    return ((codes - zeros).float() * scales).t().contiguous()


def _unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """The codes int8 (rows, 8 · columns) of words int32 (rows, columns), in the order of outputs."""
    shifts = torch.tensor(_AWQ_ORDER, dtype=torch.int32) * _AWQ_BITS
    return ((words.unsqueeze(-1) >> shifts) & 15).to(torch.int8).flatten(1)


def _packed_view(
    checkpoint: Checkpoint,
    shapes: Mapping[str, tuple[int, int]],
    parts: tuple[str, ...],
    decoders: Mapping[str, Decoder],
    title: str,
) -> DenseView:
    """The view of a checkpoint whose linears have several tensors each, in the place of `weight`."""
    inner = {f"{module}.{part}" for module in shapes for part in parts}
    tensors = {name: spec for name, spec in checkpoint.tensors.items() if name not in inner}
    for module, shape in shapes.items():
        name = f"{module}.weight"
        tensors[name] = TensorSpec(name, torch.float32, shape)
    return _view(checkpoint, tensors, {f"{module}.weight": decode for module, decode in decoders.items()}, title)


def _view(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorSpec], decoded: Mapping[str, Decoder], title: str
) -> DenseView:
    return DenseView(
        Path(checkpoint.folder), tensors, checkpoint.files, stored=checkpoint, title=title, decoded=decoded
    )


READERS: Mapping[str, Callable[[Checkpoint, Mapping[str, Any], torch.dtype], DenseView]] = {
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": compressed_view,
}
