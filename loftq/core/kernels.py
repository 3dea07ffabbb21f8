"""Compiled CPU loops over blocks. What they compute is defined, and tested, by the torch code in blockwise.

All arrays are flat float32 seen as blocks of `block` consecutive values with one scale each. A value is
divided by its scale as `x * (1 / scale)` and takes the number of boundaries strictly below it as its code,
which is what bitsandbytes does, so codes agree to the last bit. Boundaries are the midpoints between levels,
padded to an even count with infinity, because the inner loops compare with two at a time.

Block sizes are compiled in: loops of known length are a quarter faster. The work is cut into tiles of a few
blocks that stay in the first-level cache; every tile is computed the same way whichever thread it falls to,
so results do not depend on the number of threads. Reductions may be reordered (`reassoc`), products may not
be fused: a dequantized value is rounded as in bitsandbytes. Inputs are finite: callers check.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from threading import Lock
from types import FunctionType
from typing import Any

import numpy as np
import torch
from numba import njit

_TILE = 1024  # values: two float32 buffers of this length fit in any first-level cache
_SHARES = 16  # of the work, a thread
_LANES = 8  # of which a block has a multiple
_TINY = np.float32(1e-38)
_HALF, _BIT, _BELOW = np.uint32(16), np.uint32(1), np.uint32(0x7FFF)
_ZERO, _ONE, _SIXTEEN = np.float32(0), np.float32(1), np.float32(16)
_compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nnan", "nsz"})


@cache
def _for_block(function: FunctionType, block: int) -> Any:
    """`function` compiled for one block size, the default of its last argument: numba takes defaults as constants."""
    return _compiled(FunctionType(function.__code__, function.__globals__, function.__name__, (block,)))


@_compiled
def _absmax(x, scales, lanes, block):  # type: ignore[no-untyped-def]
    # Eight maxima a block side by side, then across: a maximum down one block at a time does not vectorize.
    for b in range(scales.shape[0]):
        values, maxima = x[b * block : (b + 1) * block], lanes[b * _LANES : (b + 1) * _LANES]
        for j in range(_LANES):
            maxima[j] = _ZERO
        for start in range(0, block, _LANES):
            for j in range(_LANES):
                value = abs(values[start + j])
                maxima[j] = value if value > maxima[j] else maxima[j]
    for b in range(scales.shape[0]):
        largest = lanes[b * _LANES]
        for j in range(1, _LANES):
            value = lanes[b * _LANES + j]
            largest = value if value > largest else largest
        scales[b] = largest


def _encode(x, scales, given, boundaries, packed, first, last, block=64):  # type: ignore[no-untyped-def]
    # Even and odd values part at once, so that the comparisons build whole bytes: 16 a step, 1 a step.
    half = block >> 1
    evens = np.empty(max(_TILE, block) >> 1, np.float32)
    odds = np.empty(max(_TILE, block) >> 1, np.float32)
    bytes_ = np.empty(max(_TILE, block) >> 1, np.float32)
    step = max(_TILE // block, 1)
    lanes = np.empty(step * _LANES, np.float32)
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
            inverse = _ONE / (scales[b] if abs(scales[b]) > _TINY else _TINY)
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
    scaled = np.empty(max(_TILE, block), np.float32)
    rounded = np.empty(max(_TILE, block), np.float32)
    step = max(_TILE // block, 1)
    lanes = np.empty(step * _LANES, np.float32)
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
            inverse = _ONE / (scales[b] if abs(scales[b]) > _TINY else _TINY)
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
            kept, errors = w[b * block : (b + 1) * block], e[b * block : (b + 1) * block]
            levels_b = q[(b - tile) * block : (b - tile + 1) * block]
            total = _ZERO
            for j in range(block):
                error = kept[j] - levels_b[j] * scales[b]
                errors[j] = error
                total += error * error
            squares[b] = total


def _block_absmax(w, correction, corrected, scales, first, last, block=64):  # type: ignore[no-untyped-def]
    step = max(_TILE // block, 1)
    shifted = np.empty(step * block, np.float32)
    lanes = np.empty(step * _LANES, np.float32)
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


def _dequantize(packed, scales, table, out, halved, first, last, block=64):  # type: ignore[no-untyped-def]
    # `table` has the values of every group of whole codes: of a byte, or for 3 bits of 12 bits.
    width = table.shape[1]
    wide = table.shape[0] == 4096
    buffer = np.empty(max(_TILE, block), np.float32)
    words = buffer.view(np.uint32)
    step = max(_TILE // block, 1)
    for tile in range(first, last, step):
        end = min(tile + step, last)
        n = (end - tile) * block
        at = 0
        for b in range(tile, end):
            scale = scales[b]
            if wide:
                start = b * block // 8 * 3
                for k in range(0, block // 8 * 3, 3):
                    low, middle, high = packed[start + k], packed[start + k + 1], packed[start + k + 2]
                    left = table[low | (middle & 15) << 8]
                    right = table[middle >> 4 | high << 4]
                    for j in range(4):
                        buffer[at + j] = left[j] * scale
                        buffer[at + 4 + j] = right[j] * scale
                    at += 8
            elif width == 4:
                start = b * block // 4
                for k in range(block // 4):
                    values = table[packed[start + k]]
                    for j in range(4):
                        buffer[at + j] = values[j] * scale
                    at += 4
            else:
                start = b * block // 2
                for k in range(0, block // 2, 2):
                    left = table[packed[start + k]]
                    right = table[packed[start + k + 1]]
                    for j in range(2):
                        buffer[at + j] = left[j] * scale
                        buffer[at + 2 + j] = right[j] * scale
                    at += 4
        target = out[tile * block : end * block]
        if halved:
            for j in range(n):
                even = (words[j] >> _HALF) & _BIT  # ties to even
                target[j] = (words[j] + _BELOW + even) >> _HALF
        else:
            for j in range(n):
                target[j] = buffer[j]


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="loftq-kernel")


def _over_blocks(blocks: int, work: Callable[[int, int], None]) -> None:
    """Run `work(first, last)` over all blocks, on as many threads as torch would use here."""
    threads = torch.get_num_threads()
    if threads == 1 or blocks < 4096:
        work(0, blocks)
        return
    shares = _SHARES * threads
    queue = pairwise(blocks * i // shares for i in range(shares + 1))
    lock = Lock()

    def drain() -> None:
        while True:
            with lock:
                share = next(queue, None)
            if share is None:
                return
            work(*share)

    # This thread works too: one more would compete for the cores with torch's own, which spin a while after
    # every product and let the others start late; hence many small shares.
    others = [_threads(threads - 1).submit(drain) for _ in range(threads - 1)]
    drain()
    for other in others:
        other.result()


def _flat(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().view(-1).numpy()


def absmax(w: torch.Tensor, correction: torch.Tensor | None, block: int) -> torch.Tensor:
    """Largest magnitude of each block of `w - correction`: float32 `(numel / block,)`."""
    scales = torch.empty(w.numel() // block)
    values, out = _flat(w), _flat(scales)
    shift = values if correction is None else _flat(correction)
    corrected = correction is not None
    loop = _for_block(_block_absmax, block)
    _over_blocks(len(out), lambda first, last: loop(values, shift, corrected, out, first, last))
    return scales


def squared_norm(x: torch.Tensor, block: int) -> float:
    """The sum of squares, block by block in float32 and over blocks in float64."""
    squares = np.empty(x.numel() // block, np.float32)
    values = _flat(x)
    loop = _for_block(_squares, block)
    _over_blocks(len(squares), lambda first, last: loop(values, squares, first, last))
    return float(squares.sum(dtype=np.float64))


def encode(
    x: torch.Tensor, boundaries: torch.Tensor, block: int, scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, two a byte with the first in the high half, uint8 `(numel / 2,)`, and the scales used.

    Without `scales` each block takes its own largest magnitude.
    """
    given = scales is not None
    scales = torch.empty(x.numel() // block) if scales is None else scales
    packed = torch.empty(x.numel() // 2, dtype=torch.uint8)
    values, s, edges, out = _flat(x), _flat(scales), _flat(boundaries), _flat(packed)
    loop = _for_block(_encode, block)
    _over_blocks(len(s), lambda first, last: loop(values, s, given, edges, out, first, last))
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
    """`out = w - round(w - correction)` in one pass; `out` may be `correction`. Returns its squared norm.

    Without `scales` each block takes its own largest magnitude.
    """
    given = scales is not None
    scales = torch.empty(w.numel() // block) if scales is None else scales
    squares = np.empty(scales.numel(), np.float32)
    a, e, s = _flat(w), _flat(out), _flat(scales)
    shift = a if correction is None else _flat(correction)
    edges, table = _flat(boundaries), _flat(levels)
    corrected = correction is not None
    loop = _for_block(_residual, block)

    def work(first: int, last: int) -> None:
        loop(a, shift, corrected, e, squares, s, given, edges, table, first, last)

    _over_blocks(len(s), work)
    return float(squares.sum(dtype=np.float64))


def dequantize(
    packed: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, block: int, out: torch.Tensor
) -> torch.Tensor:
    """Fill `out`, float32 or bfloat16, with levels times scales.

    `packed` is the stream of `packing`, and `table` float32 has a row for every value of a byte (of 12 bits for
    codes of 3), with the levels of the codes in it.
    """
    halved = out.dtype == torch.bfloat16
    target = out.view(-1).view(torch.int16).numpy().view(np.uint16) if halved else _flat(out)
    source, s, levels = packed.numpy(), _flat(scales), table.numpy()
    loop = _for_block(_dequantize, block)
    _over_blocks(len(s), lambda first, last: loop(source, s, levels, target, halved, first, last))
    return out
