"""Checkpoints that their publisher quantized: read as dense tensors, one at a time.

Two kinds can be read without the program that made them, because the checkpoint alone says what they mean.

FP8 in blocks (`quant_method: fp8`; DeepSeek-V3, Qwen3, MiniMax-M2). A weight (..., out, in) is float8 and has scales:

    X                float8_e4m3fn (..., out, in)
    X_scale_inv      float32 (..., out / block, in / block), rounded up; uint8 and float8_e8m0fnu are exponents of two
    W = X · scale of its block

MXFP4 (`quant_method: mxfp4`; gpt-oss; Open Compute, Microscaling Formats 1.0). Experts (experts, in, out) are stored
transposed, in blocks of 32 inputs:

    X_blocks         uint8 (experts, out, in / 32, 16)     two e2m1 values a byte, the first in the low half
    X_scales         uint8 (experts, out, in / 32)         exponents of two, plus 127
    W[e, i, o] = value · 2^(scale − 127)

Both give the values that transformers gives when it loads such a checkpoint with `dequantize=True`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from loftq.errors import CheckpointError
from loftq.formats.checkpoint import Checkpoint, TensorSpec

_SCALES = "_scale_inv"
_UNUSED = ("activation_scale", "input_scale")  # of inputs, which stay in 16 bits
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BIAS = 127  # of an exponent in a byte
_BLOCK = (128, 128)  # of FP8, where the configuration names none


Decoder = Callable[[Callable[[str], torch.Tensor]], torch.Tensor]  # from a reader of stored tensors by name


@dataclass(frozen=True)
class DenseView(Checkpoint):
    """A quantized checkpoint, whose `tensors` and `read` are those of the dense one that it stands for.

    `files` also names the files of scales. `title` is the kind of quantization, for people.
    """

    stored: Checkpoint = field(kw_only=True)
    title: str = field(kw_only=True)
    decoded: Mapping[str, Decoder] = field(kw_only=True, repr=False)

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor, dequantized to the dtype in which the model computes. Raises CheckpointError."""
        decode = self.decoded.get(name)
        return self.stored.read(name) if decode is None else decode(self.stored.read).to(self.tensors[name].dtype)

    def read_member(self, name: str, index: int) -> torch.Tensor:
        """Read one of the tensors that are stacked along the first dimension of a tensor, dequantized."""
        decode = self.decoded.get(name)
        if decode is None:
            return self.stored.read_member(name, index)

        def read(stored: str) -> torch.Tensor:
            shape = self.stored.tensors[stored].shape
            shared = len(shape) < 3  # scales of all members
            return self.stored.read(stored) if shared else self.stored.read_member(stored, index)

        return decode(read).to(self.tensors[name].dtype)

    def read_first(self, name: str, count: int) -> torch.Tensor:
        """Read at most the first `count` stored values of a tensor, flat: of a quantized one, its codes."""
        stored = name if name in self.stored.tensors else f"{name}_blocks"
        return self.stored.read_first(stored, count)


def dense_view(checkpoint: Checkpoint, quantization: Mapping[str, Any], dtype: torch.dtype) -> DenseView | None:
    """A quantized checkpoint as a dense one of `dtype`, or None if its method has no such view.

    `quantization` is the entry `quantization_config` of its `config.json`. Raises CheckpointError for scales whose
    shape does not fit.
    """
    make = READABLE.get(str(quantization.get("quant_method")))
    return None if make is None else make(checkpoint, quantization, dtype)


def _fp8(checkpoint: Checkpoint, quantization: Mapping[str, Any], dtype: torch.dtype) -> DenseView:
    block = tuple(quantization.get("weight_block_size") or _BLOCK)
    tensors: dict[str, TensorSpec] = {}
    decoded: dict[str, Decoder] = {}
    for name, spec in checkpoint.tensors.items():
        scales = checkpoint.tensors.get(name + _SCALES)
        if name.endswith((_SCALES, *_UNUSED)):
            continue
        tensors[name] = spec
        if scales is not None:
            sides = _block_sides(spec, scales, block)
            tensors[name] = TensorSpec(name, dtype, spec.shape)
            decoded[name] = _decoder_of_fp8(name, sides)
    title = f"FP8 in blocks of {block[0]} x {block[1]}"
    return DenseView(checkpoint.folder, tensors, checkpoint.files, stored=checkpoint, title=title, decoded=decoded)


def _block_sides(spec: TensorSpec, scales: TensorSpec, block: tuple[int, ...]) -> tuple[int, int]:
    """The sides of the block that shares a scale: as the configuration says, or else as the shapes say."""
    rows, columns = spec.shape[-2:] if len(spec.shape) > 1 else (1, *spec.shape)
    grid = scales.shape[-2:] if len(scales.shape) > 1 else (1, *scales.shape)[-2:]
    grid = grid if len(grid) == 2 else (1, 1)  # one scale for all
    if len(block) == 2 and grid == (-(-rows // block[0]), -(-columns // block[1])):
        return block[0], block[1]
    if 0 in grid or rows % grid[0] or columns % grid[1]:
        raise CheckpointError(
            f"tensor {scales.name!r} has shape {scales.shape}, which does not fit {spec.name!r} of shape {spec.shape} "
            f"and blocks of {' x '.join(map(str, block))}: download the checkpoint again"
        )
    return rows // grid[0], columns // grid[1]


def _decoder_of_fp8(name: str, sides: tuple[int, int]) -> Decoder:
    def decode(read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        weight, scales = read(name).float(), read(name + _SCALES)
        factors = _powers(scales) if scales.dtype == torch.uint8 else scales.float()
        if factors.dim() < 2:  # one scale for all
            return weight.mul_(factors)
        for row in range(factors.shape[-2]):
            along = factors[..., row : row + 1, :].repeat_interleave(sides[1], dim=-1)[..., : weight.shape[-1]]
            weight[..., row * sides[0] : (row + 1) * sides[0], :].mul_(along)
        return weight

    return decode


def _mxfp4(checkpoint: Checkpoint, _quantization: Mapping[str, Any], dtype: torch.dtype) -> DenseView:
    tensors: dict[str, TensorSpec] = {}
    decoded: dict[str, Decoder] = {}
    for name, spec in checkpoint.tensors.items():
        stem = name.removesuffix("_blocks")
        scales = checkpoint.tensors.get(f"{stem}_scales")
        if name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in checkpoint.tensors:
            continue
        if stem == name or scales is None:
            tensors[name] = spec
            continue
        if len(spec.shape) != 4 or spec.shape[-1] != 16 or scales.shape != spec.shape[:-1]:
            raise CheckpointError(
                f"tensor {scales.name!r} has shape {scales.shape}, which does not fit {name!r} of shape {spec.shape}: "
                "download the checkpoint again"
            )
        experts, rows, blocks, _ = spec.shape
        tensors[stem] = TensorSpec(stem, dtype, (experts, 32 * blocks, rows))
        decoded[stem] = _decoder_of_mxfp4(stem, dtype)
    files = {**checkpoint.files, **{stem: checkpoint.files[f"{stem}_blocks"] for stem in decoded}}
    return DenseView(checkpoint.folder, tensors, files, stored=checkpoint, title="MXFP4", decoded=decoded)


def _decoder_of_mxfp4(stem: str, dtype: torch.dtype) -> Decoder:
    def decode(read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        blocks, scales = read(f"{stem}_blocks"), read(f"{stem}_scales")
        if blocks.dim() == 3:  # one expert
            return _decode_mxfp4(blocks, scales).t()
        experts, rows, count, _ = blocks.shape
        dense = torch.empty(experts, 32 * count, rows, dtype=dtype)
        for expert in range(experts):  # a stack of experts may be gigabytes, and float32 twice that
            dense[expert] = _decode_mxfp4(blocks[expert], scales[expert]).t()
        return dense

    return decode


def _decode_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The values of bytes (out, blocks, 16) under exponents (out, blocks): float32 (out, 32 · blocks)."""
    values = torch.tensor(_E2M1)
    pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).int()  # (out, blocks, 16, 2)
    weight = values[pairs].flatten(2) * _powers(scales).unsqueeze(-1)
    return weight.flatten(1)


def _powers(exponents: torch.Tensor) -> torch.Tensor:
    return torch.ldexp(torch.ones(exponents.shape), exponents.int() - _BIAS)


READABLE: Mapping[str, Callable[[Checkpoint, Mapping[str, Any], torch.dtype], DenseView]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
}
