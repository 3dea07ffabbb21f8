"""The Triton kernel of rounding with feedback on a GPU, defined by `core.rounding` and tested against the CPU's loop.

A program holds the panel's columns of a few rows in registers and rounds them one after the other: each column depends
on the one before, but rows do not depend on each other.

Import this module only where `dispatch.on_gpu` says that there is Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loftq.core.kernels.nearest import Levels

_ROWS = 16  # rows of a program


@triton.jit
def _sweep(  # type: ignore[no-untyped-def]
    x,
    target,
    before,
    after,
    codes,
    coefficients,
    boundaries,
    levels,
    scales,
    shifts,
    rows,
    start,
    columns,
    block,
    low,
    high,
    WHOLE: tl.constexpr,
    BOUNDARIES: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    column = tl.arange(0, LANES)
    at = column[:, None] * rows + row[None, :]
    values = tl.load(x + at, mask=(column < WIDTH)[:, None] & alive[None, :], other=0.0)
    limits = tl.load(boundaries + tl.arange(0, BOUNDARIES)) if not WHOLE else boundaries
    first = row.to(tl.int64) * columns + start
    for j in range(WIDTH):
        value = tl.sum(tl.where(column[:, None] == j, values, 0.0), axis=0)
        here = (first + j) // block
        scale = tl.load(scales + here, mask=alive, other=1.0)
        shift = tl.load(shifts + here, mask=alive, other=0.0)
        divisor = tl.where(tl.abs(scale) > 1e-38, scale, 1e-38)
        unit = (value - shift) * tl.div_rn(tl.full([ROWS], 1.0, tl.float32), divisor)
        if WHOLE:
            # Adding 1.5 · 2²³ leaves no bits below 1, so the sum is rounded to a whole number, ties to even.
            place = ((tl.minimum(tl.maximum(unit, low), high) + 12582912.0) - 12582912.0 - low).to(tl.int32)
        else:
            place = tl.sum((unit[None, :] > limits[:, None]).to(tl.int32), axis=0)
        level = tl.load(levels + place, mask=alive, other=0.0)
        lane = j * rows + row
        error = tl.load(target + lane, mask=alive, other=0.0) - (level * scale + shift)
        change = error - tl.load(before + lane, mask=alive, other=0.0)
        tl.store(after + lane, error, mask=alive)
        tl.store(codes + lane, place.to(tl.uint8), mask=alive)
        owed = tl.load(coefficients + j * WIDTH + column, mask=(column > j) & (column < WIDTH), other=0.0)
        values += change[None, :] * owed[:, None]


def sweep(
    x: torch.Tensor,
    target: torch.Tensor,
    errors: torch.Tensor,
    coefficients: torch.Tensor,
    levels: Levels,
    scales: torch.Tensor,
    shifts: torch.Tensor,
    start: int,
    columns: int,
    block: int,
) -> torch.Tensor:
    """Do the same as `rounding.sweep`, but leave x as it is."""
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    after = torch.empty_like(errors)  # threads share a row: none may overwrite an error that another has yet to read
    width, rows = x.shape
    boundaries, table = levels.boundaries.to(x.device), levels.values.to(x.device)
    tensors = (x, target, errors, after, codes, coefficients.contiguous(), boundaries, table, scales, shifts)
    numbers = (rows, start, columns, block, float(levels.values[0]), float(levels.values[-1]))
    _sweep[(triton.cdiv(rows, _ROWS),)](
        *tensors,
        *numbers,
        WHOLE=len(boundaries) == 0,
        BOUNDARIES=len(boundaries),
        WIDTH=width,
        LANES=triton.next_power_of_2(width),
        ROWS=_ROWS,
        enable_fp_fusion=False,
    )
    errors.copy_(after)
    return codes
