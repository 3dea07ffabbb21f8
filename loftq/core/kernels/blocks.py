"""Compiled CPU loops over blocks of a codebook, defined by the torch code in `blockwise` and tested against it.

All arrays are flat float32 that hold blocks of `block` consecutive values with one scale each. A value is
divided by its scale as `x * (1 / scale)`, and its code is the number of boundaries strictly below the result.
bitsandbytes does the same, so codes agree to the last bit. Boundaries are the midpoints between levels,
padded to an even count with infinity, because the inner loops compare with two at a time. Inputs must be finite;
callers check that.
"""

from __future__ import annotations

import numpy as np
import torch

from loftq.core.kernels.compiled import LANES, TILE, TINY, compiled, flat, for_block, lent, over_blocks

_HALF, _BIT, _BELOW = np.uint32(16), np.uint32(1), np.uint32(0x7FFF)
_ZERO, _ONE, _SIXTEEN = np.float32(0), np.float32(1), np.float32(16)


@compiled
def _absmax(x, scales, lanes, block):  # type: ignore[no-untyped-def]
    # Eight maxima per block side by side, which are compared at the end: a single one does not vectorize.
    for b in range(scales.shape[0]):
        values, maxima = x[b * block : (b + 1) * block], lanes[b * LANES : (b + 1) * LANES]
        for j in range(LANES):
            maxima[j] = _ZERO
        for start in range(0, block, LANES):
            for j in range(LANES):
                value = abs(values[start + j])
                maxima[j] = value if value > maxima[j] else maxima[j]
    for b in range(scales.shape[0]):
        largest = lanes[b * LANES]
        for j in range(1, LANES):
            value = lanes[b * LANES + j]
            largest = value if value > largest else largest
        scales[b] = largest


def _encode(x, scales, given, boundaries, packed, first, last, block=64):  # type: ignore[no-untyped-def]
    # Even and odd values are separated first, so that the comparisons count up whole bytes: by 16 for even values
    # (the high half), by 1 for odd ones.
    half = block >> 1
    evens = np.empty(max(TILE, block) >> 1, np.float32)
    odds = np.empty(max(TILE, block) >> 1, np.float32)
    bytes_ = np.empty(max(TILE, block) >> 1, np.float32)
    step = max(TILE // block, 1)
    lanes = np.empty(step * LANES, np.float32)
    for tile in range(first, last, step):
        end = min(tile + step, last)
        n = (end - tile) * half
        even, odd, byte = evens[:n], odds[:n], bytes_[:n]
        if not given:
            _absmax(x[tile * block : end * block], scales[tile:end], lanes, block)
        for b in range(tile, end):
            values = x[b * block : (b + 1) * block]
            at = slice((b - tile) * half, (b - tile + 1) * half)
            even_b, odd_b = even[at], odd[at]
            inverse = _ONE / (scales[b] if abs(scales[b]) > TINY else TINY)
            for j in range(half):
                even_b[j] = values[2 * j] * inverse
                odd_b[j] = values[2 * j + 1] * inverse
        for j in range(n):
            byte[j] = _ZERO
        for k in range(0, boundaries.shape[0], 2):
            low, high = boundaries[k], boundaries[k + 1]
            for j in range(n):
                x0, x1 = even[j], odd[j]
                steps = (_SIXTEEN if x0 > low else _ZERO) + (_SIXTEEN if x0 > high else _ZERO)
                steps += (_ONE if x1 > low else _ZERO) + (_ONE if x1 > high else _ZERO)
                byte[j] += steps
        out = packed[tile * half : end * half]
        for j in range(n):
            out[j] = np.uint8(np.int32(byte[j]))


def _residual(  # type: ignore[no-untyped-def]
    w, correction, corrected, e, squares, scales, given, boundaries, levels, first, last, block=64
):
    scaled = np.empty(max(TILE, block), np.float32)
    rounded = np.empty(max(TILE, block), np.float32)
    step = max(TILE // block, 1)
    lanes = np.empty(step * LANES, np.float32)
    for tile in range(first, last, step):
        end = min(tile + step, last)
        n = (end - tile) * block
        v, q = scaled[:n], rounded[:n]
        weights = w[tile * block : end * block]
        if corrected:
            shift = correction[tile * block : end * block]
            for j in range(n):
                v[j] = weights[j] - shift[j]
        else:
            for j in range(n):
                v[j] = weights[j]
        if not given:
            _absmax(v, scales[tile:end], lanes, block)
        for b in range(tile, end):
            out = v[(b - tile) * block : (b - tile + 1) * block]
            inverse = _ONE / (scales[b] if abs(scales[b]) > TINY else TINY)
            for j in range(block):
                out[j] *= inverse
        for j in range(n):
            q[j] = levels[0]
        for k in range(0, boundaries.shape[0], 2):
            low, high = boundaries[k], boundaries[k + 1]
            below, above = levels[k + 1], levels[k + 2]
            for j in range(n):
                level = below if v[j] > low else q[j]
                q[j] = above if v[j] > high else level
        for b in range(tile, end):
            weights_b, errors = w[b * block : (b + 1) * block], e[b * block : (b + 1) * block]
            levels_b = q[(b - tile) * block : (b - tile + 1) * block]
            total = _ZERO
            for j in range(block):
                error = weights_b[j] - levels_b[j] * scales[b]
                errors[j] = error
                total += error * error
            squares[b] = total


def _block_absmax(w, correction, corrected, scales, first, last, block=64):  # type: ignore[no-untyped-def]
    step = max(TILE // block, 1)
    shifted = np.empty(step * block, np.float32)
    lanes = np.empty(step * LANES, np.float32)
    for tile in range(first, last, step):
        end = min(tile + step, last)
        weights = w[tile * block : end * block]
        if corrected:
            shift = correction[tile * block : end * block]
            for j in range((end - tile) * block):
                shifted[j] = weights[j] - shift[j]
            _absmax(shifted, scales[tile:end], lanes, block)
        else:
            _absmax(weights, scales[tile:end], lanes, block)


def _squares(x, squares, first, last, block=64):  # type: ignore[no-untyped-def]
    for b in range(first, last):
        values = x[b * block : (b + 1) * block]
        total = _ZERO
        for j in range(block):
            total += values[j] * values[j]
        squares[b] = total


def _dequantize(  # type: ignore[no-untyped-def]
    packed, scales, shifts, shifted, table, out, halved, first, last, block=64
):
    # `table` has a row for each value of a byte, or of 12 bits for codes of 3 bits, with the levels of its codes.
    width = table.shape[1]
    wide = table.shape[0] == 4096
    buffer = np.empty(max(TILE, block), np.float32)
    words = buffer.view(np.uint32)
    step = max(TILE // block, 1)
    for tile in range(first, last, step):
        end = min(tile + step, last)
        n = (end - tile) * block
        at = 0
        for b in range(tile, end):
            scale = scales[b]
            shift = shifts[b] if shifted else _ZERO
            if wide:
                start = b * block // 8 * 3
                for k in range(0, block // 8 * 3, 3):
                    low, middle, high = packed[start + k], packed[start + k + 1], packed[start + k + 2]
                    left = table[low | (middle & 15) << 8]
                    right = table[middle >> 4 | high << 4]
                    for j in range(4):
                        buffer[at + j] = left[j] * scale + shift
                        buffer[at + 4 + j] = right[j] * scale + shift
                    at += 8
            elif width == 4:
                start = b * block // 4
                for k in range(block // 4):
                    values = table[packed[start + k]]
                    for j in range(4):
                        buffer[at + j] = values[j] * scale + shift
                    at += 4
            elif width == 1:
                codes = packed[b * block : (b + 1) * block]
                for k in range(block):
                    buffer[at + k] = table[codes[k], 0] * scale + shift
                at += block
            else:
                start = b * block // 2
                for k in range(0, block // 2, 2):
                    left = table[packed[start + k]]
                    right = table[packed[start + k + 1]]
                    for j in range(2):
                        buffer[at + j] = left[j] * scale + shift
                        buffer[at + 2 + j] = right[j] * scale + shift
                    at += 4
        target = out[tile * block : end * block]
        if halved:
            for j in range(n):
                even = (words[j] >> _HALF) & _BIT  # rounds ties to even
                target[j] = (words[j] + _BELOW + even) >> _HALF
        else:
            for j in range(n):
                target[j] = buffer[j]


def absmax(w: torch.Tensor, correction: torch.Tensor | None, block: int) -> torch.Tensor:
    """The largest magnitude of each block of `w - correction`: float32 `(numel / block,)`."""
    scales = torch.empty(w.numel() // block)
    values, out = flat(w), flat(scales)
    shift = values if correction is None else flat(correction)
    corrected = correction is not None
    loop = for_block(_block_absmax, block)
    over_blocks(len(out), block, lambda first, last: loop(values, shift, corrected, out, first, last))
    return scales


def squared_norm(x: torch.Tensor, block: int) -> float:
    """The sum of squares, computed in float32 within blocks and in float64 over blocks."""
    squares = np.empty(x.numel() // block, np.float32)
    values = flat(x)
    loop = for_block(_squares, block)
    over_blocks(len(squares), block, lambda first, last: loop(values, squares, first, last))
    return float(squares.sum(dtype=np.float64))


def encode_blocks(
    x: torch.Tensor, boundaries: torch.Tensor, block: int, scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, two in each byte with the first in the high half, uint8 `(numel / 2,)`, and the scales used.

    Without `scales`, each block uses its own largest magnitude.
    """
    given = scales is not None
    scales = torch.empty(x.numel() // block) if scales is None else scales
    packed = torch.empty(x.numel() // 2, dtype=torch.uint8)
    values, s, edges, out = flat(x), flat(scales), flat(boundaries), flat(packed)
    loop = for_block(_encode, block)
    over_blocks(len(s), block, lambda first, last: loop(values, s, given, edges, out, first, last))
    return packed, scales


def residual(
    w: torch.Tensor,
    correction: torch.Tensor | None,
    out: torch.Tensor,
    boundaries: torch.Tensor,
    levels: torch.Tensor,
    block: int,
    scales: torch.Tensor | None = None,
) -> float:
    """Compute `out = w - round(w - correction)` in one pass, and return its squared norm. `out` may be `correction`.

    Without `scales`, each block uses its own largest magnitude.
    """
    given = scales is not None
    scales = torch.empty(w.numel() // block) if scales is None else scales
    squares = np.empty(scales.numel(), np.float32)
    a, e, s = flat(w), flat(out), flat(scales)
    shift = a if correction is None else flat(correction)
    edges, table = flat(boundaries), flat(levels)
    corrected = correction is not None
    loop = for_block(_residual, block)

    def work(first: int, last: int) -> None:
        loop(a, shift, corrected, e, squares, s, given, edges, table, first, last)

    over_blocks(len(s), block, work)
    return float(squares.sum(dtype=np.float64))


def dequantize_blocks(
    packed: torch.Tensor,
    scales: torch.Tensor,
    shifts: torch.Tensor | None,
    table: torch.Tensor,
    block: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Fill `out`, float32 or bfloat16, with levels times scales, plus shifts if there are any, and return it.

    `packed` is a stream of codes in the order of `packing`. `table` float32 has a row for every value of a byte (of
    12 bits for codes of 3 bits), with the levels of the codes in it.
    """
    halved = out.dtype == torch.bfloat16
    target = out.view(-1).view(torch.int16).numpy().view(np.uint16) if halved else flat(out)
    source, s, levels = lent(packed), flat(scales), table.numpy()
    t, shifted = (s, False) if shifts is None else (flat(shifts), True)
    loop = for_block(_dequantize, block)
    over_blocks(len(s), block, lambda first, last: loop(source, s, t, shifted, levels, target, halved, first, last))
    return out
