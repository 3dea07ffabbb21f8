"""Triton kernels that unpack a weight on a GPU, tested against the CPU's loops.

A code becomes `level[code] * scale + shift` in float32, where each operation is rounded separately, and is then rounded
to the output's dtype: the result agrees with the other implementations bit for bit. A single pass reads the codes and
writes the weight, without intermediate tensors.

Import this module only where `dispatch.on_gpu` says that there is Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE = 2048  # values of a stream that a program unpacks
_INPUTS, _OUTPUTS = 16, 64  # sides of the part of GPTQ's words that a program unpacks
_ROUNDED = {"enable_fp_fusion": False}  # products are rounded before they are added


@triton.jit
def _stream(  # type: ignore[no-untyped-def]
    packed, size, levels, scales, shifts, out, count, BITS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < count
    bit = at * BITS
    byte = bit >> 3
    window = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    if 8 % BITS != 0:  # may reach into the next byte
        more = tl.load(packed + byte + 1, mask=inside & (byte + 1 < size), other=0)
        window |= more.to(tl.int32) << 8
    code = (window >> (bit & 7)) & ((1 << BITS) - 1)
    block = at // BLOCK
    value = tl.load(levels + code, mask=inside) * tl.load(scales + block, mask=inside).to(tl.float32)
    if shifts is not None:
        value += tl.load(shifts + block, mask=inside).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _field(words, place, bit, inside, stride, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    # Reads BITS bits at position `bit` of streams of 32-bit words. A stream begins at its `place`, and its words are
    # `stride` apart.
    start = words + place + (bit >> 5) * stride
    offset = (bit & 31).to(tl.uint32)
    field = tl.load(start, mask=inside, other=0).to(tl.uint32, bitcast=True) >> offset
    if 32 % BITS != 0:  # may reach into the next word
        cut = offset > 32 - BITS
        more = tl.load(start + stride, mask=inside & cut, other=0).to(tl.uint32, bitcast=True)
        field |= tl.where(cut, more << ((32 - offset) & 31), 0)
    return (field & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def _words(  # type: ignore[no-untyped-def]
    qweight,
    qzeros,
    scales,
    groups,
    out,
    columns,
    outputs,
    first,
    rows,
    less,
    BITS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    column = tl.program_id(0) * INPUTS + tl.arange(0, INPUTS)[:, None]
    row = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
    inside = (column < columns) & (row < rows)
    output = first + row
    code = _field(qweight, output, column * BITS, inside, outputs, BITS)
    group = tl.load(groups + column, mask=column < columns, other=0)
    zero = _field(qzeros, group * (outputs * BITS // 32), output * BITS, inside, 1, BITS)
    scale = tl.load(scales + group * outputs + output, mask=inside, other=0).to(tl.float32)
    HALF: tl.constexpr = 1 << (BITS - 1)
    shift = scale * (HALF - zero - less).to(tl.float32)
    value = (code - HALF).to(tl.float32) * scale + shift
    tl.store(out + column * rows + row, value.to(out.dtype.element_ty), mask=inside)


def unpack_stream(
    packed: torch.Tensor,
    scales: torch.Tensor,
    shifts: torch.Tensor | None,
    levels: torch.Tensor,
    block: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Fill `out` from a stream of codes (`packing`) with levels times scales plus shifts, and return it.

    `scales` and `shifts` have one entry for each block of `block` values.
    """
    bits, count = len(levels).bit_length() - 1, out.numel()
    grid = (triton.cdiv(count, _TILE),)
    arguments = (packed, len(packed), levels, scales, shifts, out, count)
    _stream[grid](*arguments, BITS=bits, BLOCK=block, TILE=_TILE, num_warps=8, **_ROUNDED)
    return out


def unpack_words(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    bits: int,
    less: int,
    first: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Fill `out` (in, rows) from GPTQ's tensors with the transposed weight of the outputs from `first` on; return it.

    `groups` holds the number of each input's group. `less` is the difference between the zero-points and the numbers
    stored for them.
    """
    columns, rows = out.shape
    grid = (triton.cdiv(columns, _INPUTS), triton.cdiv(rows, _OUTPUTS))
    arguments = (qweight, qzeros, scales, groups, out, columns, qweight.shape[1], first, rows, less)
    _words[grid](*arguments, BITS=bits, INPUTS=_INPUTS, OUTPUTS=_OUTPUTS, **_ROUNDED)
    return out
