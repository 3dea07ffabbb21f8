"""The compiled CPU loop of rounding with feedback, defined by the torch code in `core.rounding` and tested against it.

Within a row, each column depends on the one before. Arrays are therefore (columns, rows), so that rows lie side by
side, and a tile of rows is processed in step. Products and sums of a row are computed in order and apart from other
rows, so results depend neither on tiles nor on threads.
"""

from __future__ import annotations

from math import gcd

import numpy as np
import torch

from loftq.core.kernels.compiled import TINY, flat, over_blocks, strict
from loftq.core.kernels.nearest import Levels, nearest

_ROWS = 64  # rows that are processed in step
_ONE = np.float32(1)


@strict
def _sweep(  # type: ignore[no-untyped-def]
    x,
    target,
    errors,
    codes,
    coefficients,
    scales,
    shifts,
    boundaries,
    levels,
    names,
    start,
    columns,
    block,
    first,
    last,
):
    # The changes of four columns are passed on together, so that later columns are read and written once for all four.
    width, rows = x.shape
    values, changes = np.empty((width, _ROWS), np.float32), np.empty((4, _ROWS), np.float32)
    place, unit = np.empty(_ROWS, np.float32), np.empty(_ROWS, np.float32)
    size, inverse, offset = np.empty(_ROWS, np.float32), np.empty(_ROWS, np.float32), np.empty(_ROWS, np.float32)
    period = gcd(columns, block)  # a row can enter a new block only at multiples of it
    low, high = levels[0], levels[-1]
    for tile in range(first, last):
        above, lanes = tile * _ROWS, min(_ROWS, rows - tile * _ROWS)
        side = slice(above, above + lanes)
        for j in range(width):
            values[j, :lanes] = x[j, side]
        for j in range(width):
            if j == 0 or (start + j) % period == 0:
                for r in range(lanes):
                    b = ((above + r) * columns + start + j) // block
                    size[r], offset[r] = scales[b], shifts[b]
                    inverse[r] = _ONE / (size[r] if abs(size[r]) > TINY else TINY)
            value, goal, before, code = values[j], target[j, side], errors[j, side], codes[j, side]
            change = changes[j & 3]
            for r in range(lanes):
                unit[r] = (value[r] - offset[r]) * inverse[r]
            nearest(unit[:lanes], boundaries, names, low, high, place[:lanes])
            for r in range(lanes):
                name = np.uint32(place[r])
                error = goal[r] - (levels[name] * size[r] + offset[r])
                change[r] = error - before[r]
                before[r] = error
                code[r] = np.uint8(name)
            together = j | 3
            for k in range(j + 1, min(together + 1, width)):
                weight, later = coefficients[j, k], values[k]
                for r in range(lanes):
                    later[r] += change[r] * weight
            if j < together:
                continue
            for k in range(j + 1, width):
                later = values[k]
                w0, w1 = coefficients[j - 3, k], coefficients[j - 2, k]
                w2, w3 = coefficients[j - 1, k], coefficients[j, k]
                for r in range(lanes):
                    half = later[r] + changes[0, r] * w0 + changes[1, r] * w1
                    later[r] = half + changes[2, r] * w2 + changes[3, r] * w3


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
    """Do the same as `rounding.sweep_columns` in `core`, but leave x as it is."""
    codes = torch.empty(x.shape, dtype=torch.uint8)
    arrays = (x.numpy(), target.numpy(), errors.numpy(), codes.numpy(), coefficients.contiguous().numpy())
    tables = (flat(scales), flat(shifts), *levels.arrays())
    tiles = -(-x.shape[1] // _ROWS)

    def work(first: int, last: int) -> None:
        _sweep(*arrays, *tables, start, columns, block, first, last)

    over_blocks(tiles, _ROWS * x.shape[0], work)
    return codes
