"""The compiled CPU loop of rounding with feedback, defined by the torch code in `core.rounding` and tested against it.

Within a row, each column depends on the one before. Arrays are therefore (columns, rows), so that rows lie side by
side, and a tile of rows is processed in step. Products and sums of a row are computed in order and apart from other
rows, so results depend neither on tiles nor on threads.
"""

from __future__ import annotations

from math import gcd

import numpy as np
import torch

from loftq.core.kernels.compiled import TINY, flat, fused, over_blocks, strict
from loftq.core.kernels.nearest import Levels, nearest

_ROWS = 64  # rows that are processed in step
_SPAN = 1024  # columns whose coefficients, of a panel, fit in the second-level cache
_ONE = np.float32(1)


@strict
def _pass_on(changes, values, coefficients, j, lanes):  # type: ignore[no-untyped-def]
    # The changes of four columns are passed on together, so that later columns are read and written once for all four.
    width, change, together = values.shape[0], changes[j & 3], j | 3
    for k in range(j + 1, min(together + 1, width)):
        weight, later = coefficients[j, k], values[k]
        for r in range(lanes):
            later[r] += change[r] * weight
    if j < together:
        return
    for k in range(j + 1, width):
        later = values[k]
        w0, w1 = coefficients[j - 3, k], coefficients[j - 2, k]
        w2, w3 = coefficients[j - 1, k], coefficients[j, k]
        for r in range(lanes):
            half = later[r] + changes[0, r] * w0 + changes[1, r] * w1
            later[r] = half + changes[2, r] * w2 + changes[3, r] * w3


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
            _pass_on(changes, values, coefficients, j, lanes)


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


@strict
def _descend(  # type: ignore[no-untyped-def]
    wanted,
    codes,
    changes,
    coefficients,
    scales,
    shifts,
    boundaries,
    levels,
    names,
    start,
    block,
    row,
    first,
    last,
):
    # `row` is the number of the first row in the weight.
    rows, columns = wanted.shape
    width = coefficients.shape[0]
    values, change = np.empty((width, _ROWS), np.float32), np.empty((4, _ROWS), np.float32)
    place, unit, code = np.empty(_ROWS, np.float32), np.empty(_ROWS, np.float32), np.empty((width, _ROWS), np.uint8)
    size, inverse, offset = np.empty(_ROWS, np.float32), np.empty(_ROWS, np.float32), np.empty(_ROWS, np.float32)
    period = gcd(columns, block)
    low, high = levels[0], levels[-1]
    for tile in range(first, last):
        above, lanes = tile * _ROWS, min(_ROWS, rows - tile * _ROWS)
        for r in range(lanes):
            for j in range(width):
                values[j, r] = wanted[above + r, start + j]
            for j in range(width):
                code[j, r] = codes[above + r, start + j]
        for j in range(width):
            if j == 0 or (start + j) % period == 0:
                for r in range(lanes):
                    b = ((row + above + r) * columns + start + j) // block
                    size[r], offset[r] = scales[b], shifts[b]
                    inverse[r] = _ONE / (size[r] if abs(size[r]) > TINY else TINY)
            value, old, moved = values[j], code[j], change[j & 3]
            for r in range(lanes):
                unit[r] = (value[r] - offset[r]) * inverse[r]
            nearest(unit[:lanes], boundaries, names, low, high, place[:lanes])
            for r in range(lanes):
                name = np.uint32(place[r])
                moved[r] = levels[old[r]] * size[r] - levels[name] * size[r]
                old[r] = np.uint8(name)
            for r in range(lanes):
                changes[above + r, j] = moved[r]
            _pass_on(change, values, coefficients, j, lanes)
        for r in range(lanes):
            for j in range(width):
                codes[above + r, start + j] = code[j, r]


@fused
def _carry(wanted, changes, coefficients, start, first, last):  # type: ignore[no-untyped-def]
    # Coefficients of a span of columns stay in the second-level cache, and sums of a row in the first. Four changes are
    # added together, so that sums are read and written once for all four.
    width, columns = changes.shape[1], wanted.shape[1]
    changed = np.empty(width, np.int64)
    for begin in range(start, columns, _SPAN):
        side = slice(begin, min(begin + _SPAN, columns))
        for r in range(first, last):
            count = 0
            for j in range(width):
                if changes[r, j] != 0:
                    changed[count] = j
                    count += 1
            sums = wanted[r, side]
            done = count & ~3
            for k in range(0, done, 4):
                j0, j1, j2, j3 = changed[k], changed[k + 1], changed[k + 2], changed[k + 3]
                c0, c1, c2, c3 = changes[r, j0], changes[r, j1], changes[r, j2], changes[r, j3]
                h0, h1, h2, h3 = (
                    coefficients[j0, side],
                    coefficients[j1, side],
                    coefficients[j2, side],
                    coefficients[j3, side],
                )
                for i in range(sums.shape[0]):
                    sums[i] += (c0 * h0[i] + c1 * h1[i]) + (c2 * h2[i] + c3 * h3[i])
            for k in range(done, count):
                c0, h0 = changes[r, changed[k]], coefficients[changed[k], side]
                for i in range(sums.shape[0]):
                    sums[i] += c0 * h0[i]


def descend_panel(
    wanted: torch.Tensor,
    codes: torch.Tensor,
    coefficients: torch.Tensor,
    levels: Levels,
    scales: torch.Tensor,
    shifts: torch.Tensor,
    panel: slice,
    block: int,
    row: int,
    carried: int,
) -> None:
    """Do the same as `rounding.descend_panel` in `core`, up to the order of sums."""
    rows, width = len(wanted), panel.stop - panel.start
    changes = np.empty((rows, width), np.float32)
    within, beyond = coefficients[:, panel].contiguous().numpy(), coefficients.numpy()
    arrays = (wanted.numpy(), codes.numpy(), changes, within, flat(scales), flat(shifts), *levels.arrays())

    def work(first: int, last: int) -> None:
        _descend(*arrays, panel.start, block, row, first, last)

    def carry(first: int, last: int) -> None:
        _carry(arrays[0], changes, beyond, carried, first, last)

    over_blocks(-(-rows // _ROWS), _ROWS * width, work)
    over_blocks(rows, wanted.shape[1], carry)
