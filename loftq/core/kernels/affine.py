"""Compiled CPU loops over groups of integers, defined by the torch code in `core.affine` and tested against it.

All arrays are flat float32 that hold groups of `block` consecutive values, each with a scale and a shift. A value takes
the whole number nearest to `(x - shift) * (1 / scale)`, ties to even, within `low` and `high`. Inputs must be finite;
callers check that.
"""

from __future__ import annotations

import numpy as np
import torch

from loftq.core.kernels.compiled import LANES, TILE, TINY, compiled, flat, over_blocks

_ZERO, _ONE = np.float32(0), np.float32(1)


@compiled
def _range(x, lows, highs, low_lanes, high_lanes, block):  # type: ignore[no-untyped-def]
    # Eight minima and maxima per block side by side, which are compared at the end: a single one does not vectorize.
    for b in range(lows.shape[0]):
        values = x[b * block : (b + 1) * block]
        for j in range(LANES):
            low_lanes[j] = values[j]
            high_lanes[j] = values[j]
        for start in range(LANES, block, LANES):
            for j in range(LANES):
                value = values[start + j]
                low_lanes[j] = value if value < low_lanes[j] else low_lanes[j]
                high_lanes[j] = value if value > high_lanes[j] else high_lanes[j]
        low, high = low_lanes[0], high_lanes[0]
        for j in range(1, LANES):
            low = low_lanes[j] if low_lanes[j] < low else low
            high = high_lanes[j] if high_lanes[j] > high else high
        lows[b], highs[b] = low, high


@compiled
def _ranges(w, correction, corrected, lows, highs, first, last, block):  # type: ignore[no-untyped-def]
    step = max(TILE // block, 1)
    shifted = np.empty(step * block, np.float32)
    low_lanes, high_lanes = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for tile in range(first, last, step):
        end = min(tile + step, last)
        weights = w[tile * block : end * block]
        if corrected:
            subtrahend = correction[tile * block : end * block]
            for j in range((end - tile) * block):
                shifted[j] = weights[j] - subtrahend[j]
            _range(shifted, lows[tile:end], highs[tile:end], low_lanes, high_lanes, block)
        else:
            _range(weights, lows[tile:end], highs[tile:end], low_lanes, high_lanes, block)


@compiled
def _encode(x, scales, shifts, low, high, paired, packed, first, last, block):  # type: ignore[no-untyped-def]
    buffer = np.empty(block, np.float32)
    half = block >> 1
    for b in range(first, last):
        values = x[b * block : (b + 1) * block]
        inverse = _ONE / (scales[b] if abs(scales[b]) > TINY else TINY)
        shift = shifts[b]
        for j in range(block):
            level = np.rint((values[j] - shift) * inverse)
            level = low if level < low else level
            buffer[j] = (high if level > high else level) - low
        if paired:
            out = packed[b * half : (b + 1) * half]
            for j in range(half):
                out[j] = np.uint8(np.int32(buffer[2 * j]) << 4 | np.int32(buffer[2 * j + 1]))
        else:
            out = packed[b * block : (b + 1) * block]
            for j in range(block):
                out[j] = np.uint8(np.int32(buffer[j]))


@compiled
def _residual(  # type: ignore[no-untyped-def]
    w, correction, corrected, e, squares, scales, shifts, low, high, first, last, block
):
    buffer = np.empty(block, np.float32)
    for b in range(first, last):
        weights, errors = w[b * block : (b + 1) * block], e[b * block : (b + 1) * block]
        if corrected:
            subtrahend = correction[b * block : (b + 1) * block]
            for j in range(block):
                buffer[j] = weights[j] - subtrahend[j]
        else:
            for j in range(block):
                buffer[j] = weights[j]
        scale, shift = scales[b], shifts[b]
        inverse = _ONE / (scale if abs(scale) > TINY else TINY)
        total = _ZERO
        for j in range(block):
            level = np.rint((buffer[j] - shift) * inverse)
            level = low if level < low else level
            level = high if level > high else level
            error = weights[j] - (level * scale + shift)
            errors[j] = error
            total += error * error
        squares[b] = total


@compiled
def _moments(x, scales, shifts, low, high, sums, first, last, block):  # type: ignore[no-untyped-def]
    for b in range(first, last):
        values = x[b * block : (b + 1) * block]
        inverse = _ONE / (scales[b] if abs(scales[b]) > TINY else TINY)
        shift = shifts[b]
        levels, squares, weights, products = _ZERO, _ZERO, _ZERO, _ZERO
        for j in range(block):
            level = np.rint((values[j] - shift) * inverse)
            level = low if level < low else level
            level = high if level > high else level
            levels += level
            squares += level * level
            weights += values[j]
            products += level * values[j]
        sums[0, b], sums[1, b], sums[2, b], sums[3, b] = levels, squares, weights, products


def ranges(w: torch.Tensor, correction: torch.Tensor | None, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest value of each group of `w - correction`: float32 `(numel / block,)` each."""
    lows, highs = torch.empty(w.numel() // block), torch.empty(w.numel() // block)
    values, low, high = flat(w), flat(lows), flat(highs)
    shift = values if correction is None else flat(correction)
    corrected = correction is not None
    over_blocks(len(low), block, lambda first, last: _ranges(values, shift, corrected, low, high, first, last, block))
    return lows, highs


def encode_groups(x: torch.Tensor, scales: torch.Tensor, shifts: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """Codes, counted from 0: uint8 `(numel,)`, or `(numel / 2,)` for at most 4 bits, where two share a byte.

    The first of the two is in the high half.
    """
    paired = bits <= 4
    packed = torch.empty(x.numel() // 2 if paired else x.numel(), dtype=torch.uint8)
    values, s, t, out = flat(x), flat(scales), flat(shifts), flat(packed)
    low, high = _bounds(bits)
    over_blocks(len(s), block, lambda first, last: _encode(values, s, t, low, high, paired, out, first, last, block))
    return packed


def moments(x: torch.Tensor, scales: torch.Tensor, shifts: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """For each group the sums of levels, their squares, values, and levels times values: float32 (4, groups)."""
    sums = torch.empty(4, scales.numel())
    values, s, t, out = flat(x), flat(scales), flat(shifts), sums.numpy()
    low, high = _bounds(bits)
    over_blocks(len(s), block, lambda first, last: _moments(values, s, t, low, high, out, first, last, block))
    return sums


def residual(
    w: torch.Tensor,
    correction: torch.Tensor | None,
    out: torch.Tensor,
    scales: torch.Tensor,
    shifts: torch.Tensor,
    bits: int,
    block: int,
) -> float:
    """Compute `out = w - round(w - correction)` in one pass, and return its squared norm. `out` may be `correction`."""
    squares = np.empty(scales.numel(), np.float32)
    a, e, s, t = flat(w), flat(out), flat(scales), flat(shifts)
    subtrahend = a if correction is None else flat(correction)
    corrected = correction is not None
    low, high = _bounds(bits)

    def work(first: int, last: int) -> None:
        _residual(a, subtrahend, corrected, e, squares, s, t, low, high, first, last, block)

    over_blocks(len(s), block, work)
    return float(squares.sum(dtype=np.float64))


def _bounds(bits: int) -> tuple[np.float32, np.float32]:
    half = 2 ** (bits - 1)
    return np.float32(-half), np.float32(half - 1)
