"""GGUF with linears in Q4_1: one file that llama.cpp runs and transformers reads (`gguf_file=`).

A row of a linear is cut into blocks of 32 consecutive inputs, each of 20 bytes:

    d       float16      scale
    m       float16      the value of code 0
    codes   uint8 (16)   code i in the low half of byte i, code i + 16 in the high half

    W~ = d · code + m

A larger group is stored as several blocks with the same scale and bias. Codes are stored without a change. A scale or
bias is rounded to float16, which moves a weight by at most 2^-11 · (15 · |d| + |m|), usually about 1/90 of a step.

Matrices that are not quantized keep their type, and vectors become float32, as llama.cpp expects. In the rotary
embedding, its llama pairs neighbouring rows of a head, but transformers pairs halves. Therefore rows of q_proj and
k_proj are reordered for the architectures that need it (`gguf_metadata.ARCHITECTURES`). Tied embeddings are written
once.

First everything is checked and planned from names and shapes. Then tensors are read, converted and written one by one.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loftq.core.affine import AffineWeight
from loftq.errors import CheckpointError, OptionError
from loftq.formats.checkpoint import TensorSpec
from loftq.formats.disk import replacing
from loftq.formats.gguf_metadata import ROPE_FREQUENCIES, add_metadata, architecture, rope_factors, rotary_order
from loftq.formats.gguf_tokenizer import add_tokenizer

OPTION = "--to gguf-q4_1"
BITS = 4
BLOCK = 32
DENSE_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_IGNORED = (".rotary_emb.inv_freq",)  # follows from the config; old checkpoints have it


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: its name there, its name here (of a linear the module's), type and shape."""

    name: str
    source: str
    kind: str
    shape: tuple[int, ...]


def check_linears(config: Mapping[str, Any], bits: int, group_size: int) -> None:
    """Raise OptionError for a model or codes that this format cannot hold, and if gguf is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise OptionError(f"{OPTION} needs the gguf package: pip install gguf")
    architecture(config)
    rope_factors(config)
    _check_codes(bits, group_size, "")


def blocks(weight: AffineWeight) -> torch.Tensor:
    """A weight (out, in) of 4 bits in blocks: uint8 (out, in / 32 · 20).

    Raises OptionError where it is of another width, where 32 does not divide its group, and where its scales or biases
    are beyond float16.
    """
    _check_codes(weight.bits, weight.group_size, "")
    rows = len(weight.codes)
    codes = weight.codes.reshape(rows, -1, 2, BLOCK // 2)  # (out, blocks, half, 16)
    packed = codes[:, :, 0] | (codes[:, :, 1] << 4)
    pairs = torch.stack([weight.scales, weight.biases], dim=2).half()  # (out, groups, 2)
    if not pairs.isfinite().all():
        raise OptionError(f"{OPTION} holds scales and biases of up to 65504: this weight has larger ones: use --to mlx")
    heads = pairs.view(torch.uint8).repeat_interleave(weight.group_size // BLOCK, dim=1)  # (out, blocks, 4)
    return torch.cat([heads, packed], dim=2).view(rows, -1)


def write(
    path: Path,
    config: Mapping[str, Any],
    folder: Path,
    linears: Mapping[str, tuple[int, ...]],
    dense: Mapping[str, TensorSpec],
    read_linear: Callable[[str], AffineWeight],
    read_dense: Callable[[str], torch.Tensor],
    name: str | None = None,
) -> None:
    """Write a model as one file, which appears under its name when it is complete.

    `folder` has the tokenizer, `linears` the shape of each quantized linear by its module's name, `dense` all other
    tensors by their names in the checkpoint. The two readers are called once for each, in order. `name` is that of the
    model, by default that of the folder.

    Raises OptionError for what has no place in the format, CheckpointError for a tensor that is not as announced.
    """
    import gguf

    def values(entry: _Entry) -> torch.Tensor:
        if entry.kind == "Q4_1":
            return _linear(entry, config, read_linear(entry.source))
        if entry.name == ROPE_FREQUENCIES:
            return torch.tensor(rope_factors(config), dtype=torch.float32)
        return _dense(entry, config, read_dense(entry.source), dense[entry.source])

    entries = _lay_out(config, linears, dense)
    with replacing(path) as partial:
        writer = gguf.GGUFWriter(partial, architecture(config).name)
        add_metadata(writer, config, name or folder.name)
        add_tokenizer(writer, folder, int(config["vocab_size"]))
        for entry in entries:
            kind = gguf.GGMLQuantizationType[entry.kind]
            block, nbytes = gguf.GGML_QUANT_SIZES[kind]
            size = math.prod(entry.shape) // block * nbytes
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, kind)  # its type is the last
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry in entries:
                writer.write_tensor_data(values(entry).contiguous().view(-1).view(torch.uint8).numpy())
        finally:
            writer.close()


def _lay_out(
    config: Mapping[str, Any], linears: Mapping[str, tuple[int, ...]], dense: Mapping[str, TensorSpec]
) -> list[_Entry]:
    """The tensors of the file, in order."""
    import gguf

    kind = gguf.MODEL_ARCH[architecture(config).name.upper()]
    names = gguf.get_tensor_name_map(kind, int(config["num_hidden_layers"]))
    tied = config.get("tie_word_embeddings", False)

    def named(source: str) -> str:
        target_name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if target_name is None:
            raise OptionError(
                f"{OPTION}: tensor {source!r} has no equivalent in a GGUF {kind.name.lower()}: use --to mlx"
            )
        return str(target_name)

    entries = []
    for module, shape in linears.items():
        if shape[1] % BLOCK:
            raise OptionError(f"{OPTION}: {module} has {shape[1]} inputs, expected a multiple of {BLOCK}: use --to mlx")
        entries.append(_Entry(named(f"{module}.weight"), module, "Q4_1", tuple(shape)))
    for name, spec in dense.items():
        if spec.dtype not in DENSE_TYPES:
            raise OptionError(f"{OPTION}: tensor {name!r} is {spec.dtype}, expected {', '.join(map(str, DENSE_TYPES))}")
        if not name.endswith(_IGNORED) and not (tied and name == "lm_head.weight"):
            entries.append(_Entry(named(name), name, DENSE_TYPES[_stored(spec)], spec.shape))
    if (factors := rope_factors(config)) is not None:
        entries.append(_Entry(ROPE_FREQUENCIES, "", "F32", (len(factors),)))
    return entries


def _linear(entry: _Entry, config: Mapping[str, Any], weight: AffineWeight) -> torch.Tensor:
    if tuple(weight.codes.shape) != entry.shape:
        raise CheckpointError(f"linear {entry.source!r} is {tuple(weight.codes.shape)}, planned {entry.shape}")
    _check_codes(weight.bits, weight.group_size, f": {entry.source}")
    order = rotary_order(entry.name, entry.shape[0], config)
    if order is not None:
        weight = AffineWeight(weight.codes[order], weight.scales[order], weight.shifts[order], weight.bits)
    return blocks(weight)


def _dense(entry: _Entry, config: Mapping[str, Any], tensor: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
        raise CheckpointError(
            f"tensor {entry.source!r} is {tensor.dtype} {tuple(tensor.shape)}, planned {spec.dtype} {spec.shape}"
        )
    order = rotary_order(entry.name, entry.shape[0], config)
    values = tensor.detach().cpu().to(_stored(spec))
    return values if order is None else values[order]


def _stored(spec: TensorSpec) -> torch.dtype:
    return torch.float32 if len(spec.shape) == 1 else spec.dtype


def _check_codes(bits: int, group_size: int, where: str) -> None:
    if bits != BITS:
        raise OptionError(f"{OPTION}{where}: it holds integers of {BITS} bits, not {bits}: use --to mlx")
    if group_size % BLOCK:
        raise OptionError(
            f"{OPTION}{where}: it holds groups of a multiple of {BLOCK} inputs, not {group_size}: "
            f"quantize with --group-size {BLOCK}, 64 or 128"
        )
