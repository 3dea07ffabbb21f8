"""The Triton kernel that decodes trellis codes on a GPU, tested against the CPU's loop.

States do not depend on each other (`core.trellis`), so each program decodes a tile of inputs and outputs. Products are
rounded in the order of the CPU's loop: the result agrees with it bit for bit.

Import this module only where `dispatch.on_gpu` says that there is Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_INPUTS, _OUTPUTS = 8, 256  # sides of a tile


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
    width = tl.load(widths + column, mask=column < inputs, other=0).to(tl.int64)[:, None]
    begin = tl.load(begins + column, mask=column < inputs, other=0)[:, None]
    inside = (column < inputs)[:, None] & (row < outputs)[None, :]
    bit = begin + width * row[None, :]
    word = words + (bit >> 5)
    coded = inside & (width > 0)
    low = tl.load(word, mask=coded, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(word + 1, mask=coded, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
    window = (low | (high << 32)) >> (bit & 31).to(tl.uint64)
    state = (window & ((1 << LENGTH) - 1)).to(tl.int64)
    value = tl.load(levels + ((width - 1) << LENGTH) + state, mask=coded, other=0.0)
    value *= tl.load(columns + column, mask=column < inputs, other=0.0).to(tl.float32)[:, None]
    value *= tl.load(scales + row, mask=row < outputs, other=0.0)[None, :]
    tl.store(out + column.to(tl.int64)[:, None] * outputs + row[None, :], value.to(out.dtype.element_ty), mask=inside)


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
    """Fill `out` (in, outputs) with the weight transposed, and return it. Arguments are those of `viterbi.decode`."""
    inputs, outputs = out.shape
    grid = (triton.cdiv(inputs, _INPUTS), triton.cdiv(outputs, _OUTPUTS))
    tensors = (words, begins, widths, levels, columns, rows, out)
    _decode[grid](*tensors, inputs, outputs, LENGTH=length, INPUTS=_INPUTS, OUTPUTS=_OUTPUTS)
    return out
