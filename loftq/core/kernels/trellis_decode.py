"""Compiled CPU loops that decode trellis codes (`core.trellis`): into a matrix, or into its product with a few vectors.

A part of a column is decoded into a buffer that stays in the first-level cache. From there it is scaled and written, or
multiplied, so that a product with a few vectors needs no memory for the weight.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from loftq.core.kernels.compiled import TILE, compiled, over_blocks, strict

_HALF, _BIT, _BELOW = np.uint32(16), np.uint32(1), np.uint32(0x7FFF)
_ZERO = np.float32(0)
_FEW = 256  # outputs of a product that a thread computes at a time, so that there are enough for all threads


class Coded(NamedTuple):
    """A coded weight, or some of its outputs.

    `words` are uint32, with one more after the last column; `begins`, int64 (in,), are the first bits of columns, and
    `widths` uint8 (in,); `tables` are float32 and flat; `columns` (in,) and `rows` (outputs,) are float32.
    """

    words: np.ndarray
    begins: np.ndarray
    widths: np.ndarray
    tables: np.ndarray
    columns: np.ndarray
    rows: np.ndarray
    length: int


@strict
def _levels(words, bit, width, levels, mask, values):  # type: ignore[no-untyped-def]
    # The levels of a column from a bit on. Eight states are read from each window of 64 bits.
    count, step, done = values.shape[0], np.uint64(width), 0
    if width <= 3:  # the first 33 bits are enough
        for t in range(0, count - 7, 8):
            at = bit + width * t
            i = at >> 5
            window = (np.uint64(words[i]) | (np.uint64(words[i + 1]) << np.uint64(32))) >> np.uint64(at & 31)
            for k in range(8):
                values[t + k] = levels[window & mask]
                window >>= step
        done = count // 8 * 8
    else:
        for t in range(0, count - 7, 8):
            at = bit + width * t
            i = at >> 5
            if i + 2 >= words.shape[0]:
                break
            shift = np.uint64(at & 31)
            window = (np.uint64(words[i]) | (np.uint64(words[i + 1]) << np.uint64(32))) >> shift
            window |= (np.uint64(words[i + 2]) << (np.uint64(63) - shift)) << np.uint64(1)
            for k in range(8):
                values[t + k] = levels[window & mask]
                window >>= step
            done = t + 8
    for t in range(done, count):
        at = bit + width * t
        i = at >> 5
        window = np.uint64(words[i]) | (np.uint64(words[i + 1]) << np.uint64(32))
        values[t] = levels[(window >> np.uint64(at & 31)) & mask]


@strict
def _decode(  # type: ignore[no-untyped-def]
    words, begins, widths, tables, columns, rows, length, out, halved, first, last
):
    count = 1 << length
    mask = np.uint64(count - 1)
    buffer = np.empty(TILE, np.float32)
    patterns = buffer.view(np.uint32)
    for j in range(first, last):
        width, scale, target = np.int64(widths[j]), columns[j], out[j]
        if width == 0:
            target[:] = 0
            continue
        levels = tables[(width - 1) * count : width * count]
        for start in range(0, rows.shape[0], TILE):
            n = min(TILE, rows.shape[0] - start)
            values, part, some = buffer[:n], rows[start : start + n], target[start : start + n]
            _levels(words, begins[j] + width * start, width, levels, mask, values)
            if halved:
                for t in range(n):
                    values[t] = values[t] * scale * part[t]
                for t in range(n):
                    even = (patterns[t] >> _HALF) & _BIT  # rounds ties to even
                    some[t] = (patterns[t] + _BELOW + even) >> _HALF
            else:
                for t in range(n):
                    some[t] = values[t] * scale * part[t]


@compiled
def _multiply(  # type: ignore[no-untyped-def]
    words, begins, widths, tables, columns, rows, length, x, out, first, last
):
    # The tiles of outputs from `first` to `last` of x Wᵀ, for x (vectors, in).
    count, vectors = 1 << length, x.shape[0]
    mask = np.uint64(count - 1)
    buffer = np.empty(_FEW, np.float32)
    for tile in range(first, last):
        start = tile * _FEW
        n = min(_FEW, rows.shape[0] - start)
        values = buffer[:n]
        sums = np.zeros((vectors, n), np.float32)
        for j in range(widths.shape[0]):
            width = np.int64(widths[j])
            if width == 0:
                continue
            levels = tables[(width - 1) * count : width * count]
            _levels(words, begins[j] + width * start, width, levels, mask, values)
            for v in range(vectors):
                factor, total = x[v, j] * columns[j], sums[v]
                for t in range(n):
                    total[t] += values[t] * factor
        for v in range(vectors):
            for t in range(n):
                out[v, start + t] = sums[v, t] * rows[start + t]


@compiled
def _multiply_back(  # type: ignore[no-untyped-def]
    words, begins, widths, tables, columns, length, x, out, first, last
):
    # The columns from `first` to `last` of x W, for x (vectors, outputs) that is multiplied by `rows` already.
    count, vectors, outputs = 1 << length, x.shape[0], x.shape[1]
    mask = np.uint64(count - 1)
    buffer = np.empty(TILE, np.float32)
    for j in range(first, last):
        width = np.int64(widths[j])
        for v in range(vectors):
            out[v, j] = _ZERO
        if width == 0:
            continue
        levels = tables[(width - 1) * count : width * count]
        for start in range(0, outputs, TILE):
            n = min(TILE, outputs - start)
            values = buffer[:n]
            _levels(words, begins[j] + width * start, width, levels, mask, values)
            for v in range(vectors):
                factors, total = x[v, start : start + n], _ZERO
                for t in range(n):
                    total += values[t] * factors[t]
                out[v, j] += total
        for v in range(vectors):
            out[v, j] *= columns[j]


def decode(coded: Coded, out: np.ndarray) -> None:
    """Fill `out` (in, outputs), float32 or the bits of bfloat16 in uint16, with the weight transposed."""
    halved = out.dtype == np.uint16

    def work(first: int, last: int) -> None:
        _decode(*coded, out, halved, first, last)

    over_blocks(len(coded.widths), len(coded.rows), work)


def multiply(coded: Coded, x: np.ndarray) -> np.ndarray:
    """The product x Wᵀ (vectors, outputs) of a few vectors x (vectors, in), float32, summed in float32."""
    out = np.empty((len(x), len(coded.rows)), np.float32)

    def work(first: int, last: int) -> None:
        _multiply(*coded, x, out, first, last)

    over_blocks(-(-len(coded.rows) // _FEW), _FEW * len(coded.widths), work)
    return out


def multiply_back(coded: Coded, x: np.ndarray) -> np.ndarray:
    """The product x W (vectors, in) of a few vectors x (vectors, outputs), float32, summed in float32."""
    out = np.empty((len(x), len(coded.widths)), np.float32)
    scaled = x * coded.rows

    def work(first: int, last: int) -> None:
        _multiply_back(*coded[:5], coded.length, scaled, out, first, last)

    over_blocks(len(coded.widths), len(coded.rows), work)
    return out
