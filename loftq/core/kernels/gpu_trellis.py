"""The Triton kernels that decode trellis codes on a GPU, tested against the CPU's loops.

States do not depend on each other (`core.trellis`), so each program decodes a tile of inputs and outputs. Products are
rounded in the order of the CPU's loop: the result agrees with it bit for bit. The product with a few vectors decodes in
registers, and never writes the weight to memory.

Import this module only where `dispatch.on_gpu` says that there is Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_INPUTS, _OUTPUTS = 8, 256  # sides of a tile
_SPAN = 128  # inputs over which a program sums


@triton.jit
def _levels(words, begins, widths, levels, column, row, inputs, outputs, LENGTH: tl.constexpr):  # type: ignore[no-untyped-def]
    # The levels (columns, rows) before scales, 0 outside the weight and in columns of no bits.
    width = tl.load(widths + column, mask=column < inputs, other=0).to(tl.int64)[:, None]
    begin = tl.load(begins + column, mask=column < inputs, other=0)[:, None]
    bit = begin + width * row[None, :]
    word = words + (bit >> 5)
    coded = (column < inputs)[:, None] & (row < outputs)[None, :] & (width > 0)
    low = tl.load(word, mask=coded, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(word + 1, mask=coded, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
    window = (low | (high << 32)) >> (bit & 31).to(tl.uint64)
    state = (window & ((1 << LENGTH) - 1)).to(tl.int64)
    return tl.load(levels + ((width - 1) << LENGTH) + state, mask=coded, other=0.0)


@triton.jit
def _decode(  # type: ignore[no-untyped-def]
    words,
    begins,
    widths,
    levels,
    columns,
    scales,
    out,
    inputs,
    outputs,
    LENGTH: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    column = tl.program_id(0) * INPUTS + tl.arange(0, INPUTS)
    row = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = (column < inputs)[:, None] & (row < outputs)[None, :]
    value = _levels(words, begins, widths, levels, column, row, inputs, outputs, LENGTH)
    value *= tl.load(columns + column, mask=column < inputs, other=0.0).to(tl.float32)[:, None]
    value *= tl.load(scales + row, mask=row < outputs, other=0.0)[None, :]
    tl.store(out + column.to(tl.int64)[:, None] * outputs + row[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]
    words,
    begins,
    widths,
    levels,
    columns,
    scales,
    x,
    out,
    inputs,
    outputs,
    vectors,
    LENGTH: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SPAN: tl.constexpr,
    VECTORS: tl.constexpr,
):
    # The sums over a span of inputs of x Wᵀ: x is (vectors, in), `out` float32 (spans, vectors, outputs).
    row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    vector = tl.arange(0, VECTORS)
    total = tl.zeros([VECTORS, OUTPUTS], tl.float32)
    for start in range(0, SPAN, INPUTS):
        column = tl.program_id(1) * SPAN + start + tl.arange(0, INPUTS)
        value = _levels(words, begins, widths, levels, column, row, inputs, outputs, LENGTH)
        value *= tl.load(columns + column, mask=column < inputs, other=0.0).to(tl.float32)[:, None]
        some = (vector < vectors)[:, None] & (column < inputs)[None, :]
        factor = tl.load(x + vector[:, None] * inputs + column[None, :], mask=some, other=0.0).to(tl.float32)
        total += tl.sum(factor[:, :, None] * value[None, :, :], axis=1)
    total *= tl.load(scales + row, mask=row < outputs, other=0.0)[None, :]
    place = (tl.program_id(1) * vectors + vector[:, None]) * outputs + row[None, :]
    tl.store(out + place, total, mask=(vector < vectors)[:, None] & (row < outputs)[None, :])


@triton.jit
def _multiply_back(  # type: ignore[no-untyped-def]
    words,
    begins,
    widths,
    levels,
    columns,
    scales,
    x,
    out,
    inputs,
    outputs,
    vectors,
    LENGTH: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILES: tl.constexpr,
    VECTORS: tl.constexpr,
):
    # x W: x is (vectors, outputs), `out` (vectors, inputs).
    column = tl.program_id(0) * INPUTS + tl.arange(0, INPUTS)
    vector = tl.arange(0, VECTORS)
    total = tl.zeros([VECTORS, INPUTS], tl.float32)
    for tile in range(TILES):
        row = tile * OUTPUTS + tl.arange(0, OUTPUTS)
        value = _levels(words, begins, widths, levels, column, row, inputs, outputs, LENGTH)
        some = (vector < vectors)[:, None] & (row < outputs)[None, :]
        factor = tl.load(x + vector[:, None] * outputs + row[None, :], mask=some, other=0.0).to(tl.float32)
        factor *= tl.load(scales + row, mask=row < outputs, other=0.0)[None, :]
        total += tl.sum(factor[:, None, :] * value[None, :, :], axis=2)
    total *= tl.load(columns + column, mask=column < inputs, other=0.0).to(tl.float32)[None, :]
    place = out + vector[:, None] * inputs + column[None, :]
    inside = (vector < vectors)[:, None] & (column < inputs)[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


def decode(
    words: torch.Tensor,
    begins: torch.Tensor,
    widths: torch.Tensor,
    levels: torch.Tensor,
    columns: torch.Tensor,
    rows: torch.Tensor,
    length: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Fill `out` (in, outputs) with the weight transposed, and return it.

    The other arguments are those of `trellis_decode.Coded`, as tensors; `columns` may be of any dtype.
    """
    inputs, outputs = out.shape
    grid = (triton.cdiv(inputs, _INPUTS), triton.cdiv(outputs, _OUTPUTS))
    tensors = (words, begins, widths, levels, columns, rows, out)
    _decode[grid](*tensors, inputs, outputs, LENGTH=length, INPUTS=_INPUTS, OUTPUTS=_OUTPUTS)
    return out


def multiply(*coded: Any, x: torch.Tensor) -> torch.Tensor:
    """The product x Wᵀ (vectors, outputs) of a few vectors x (vectors, in), in their dtype.

    The first arguments are those of `decode` up to `length`.
    """
    *tensors, length = coded
    (vectors, inputs), outputs = x.shape, len(tensors[-1])
    spans = triton.cdiv(inputs, _SPAN)
    out = torch.empty(spans, vectors, outputs, device=x.device)
    sizes = {"LENGTH": length, "INPUTS": _INPUTS, "OUTPUTS": _OUTPUTS, "VECTORS": triton.next_power_of_2(vectors)}
    grid = (triton.cdiv(outputs, _OUTPUTS), spans)
    _multiply[grid](*tensors, x, out, inputs, outputs, vectors, SPAN=_SPAN, **sizes)
    return out.sum(dim=0).to(x.dtype)


def multiply_back(*coded: Any, x: torch.Tensor) -> torch.Tensor:
    """The product x W (vectors, in) of a few vectors x (vectors, outputs), in their dtype."""
    *tensors, length = coded
    (vectors, outputs), inputs = x.shape, len(tensors[2])
    out = torch.empty(vectors, inputs, dtype=x.dtype, device=x.device)
    sizes = {"LENGTH": length, "INPUTS": _INPUTS, "OUTPUTS": _OUTPUTS, "VECTORS": triton.next_power_of_2(vectors)}
    tiles = triton.cdiv(outputs, _OUTPUTS)
    _multiply_back[triton.cdiv(inputs, _INPUTS),](*tensors, x, out, inputs, outputs, vectors, TILES=tiles, **sizes)
    return out
