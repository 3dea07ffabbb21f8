"""Compiled CPU loops of the trellis code (`core.trellis`): Viterbi's search along a column, and the stream it gives.

The costs of all states are one float32 array. A cost is never negative, so its bits compare as an integer does, and its
lowest bits can hold the number of the state before: one minimum of integers finds the least cost and where it comes
from. That changes a cost by less than one part in 250,000.
"""

from __future__ import annotations

import numpy as np

from loftq.core.kernels.compiled import strict

RESET = 16  # steps after which the least cost is subtracted from all, so that float32 keeps their differences


@strict
def _least_of_2(costs, least):  # type: ignore[no-untyped-def]
    for m in range(least.shape[0]):
        a = costs[2 * m] & np.int32(-2)
        b = (costs[2 * m + 1] & np.int32(-2)) | np.int32(1)
        least[m] = min(a, b)


@strict
def _least_of_4(costs, least):  # type: ignore[no-untyped-def]
    keep = np.int32(-4)
    for m in range(least.shape[0]):
        i = 4 * m
        a = min(costs[i] & keep, (costs[i + 1] & keep) | np.int32(1))
        b = min((costs[i + 2] & keep) | np.int32(2), (costs[i + 3] & keep) | np.int32(3))
        least[m] = min(a, b)


@strict
def _least_of_8(costs, least):  # type: ignore[no-untyped-def]
    keep = np.int32(-8)
    for m in range(least.shape[0]):
        i = 8 * m
        a = min(costs[i] & keep, (costs[i + 1] & keep) | np.int32(1))
        b = min((costs[i + 2] & keep) | np.int32(2), (costs[i + 3] & keep) | np.int32(3))
        c = min((costs[i + 4] & keep) | np.int32(4), (costs[i + 5] & keep) | np.int32(5))
        d = min((costs[i + 6] & keep) | np.int32(6), (costs[i + 7] & keep) | np.int32(7))
        least[m] = min(min(a, b), min(c, d))


@strict
def _least_of_many(costs, least, branches):  # type: ignore[no-untyped-def]
    keep = np.int32(-branches)
    for m in range(least.shape[0]):
        best = np.int32(2147483647)
        for low in range(branches):
            best = min(best, np.int32((costs[branches * m + low] & keep) | np.int32(low)))
        least[m] = best


@strict
def _search(x, weights, table, width, length, costs, least, before, states):  # type: ignore[no-untyped-def]
    # `costs` (states,) and `least` (states / branches,) are float32 to work in; `before` (steps, states / branches)
    # is uint8 and holds the lowest bits of the state before.
    count, branches = 1 << length, 1 << width
    ends = count >> width
    steps = x.shape[0]
    cost_bits, least_bits = costs.view(np.int32), least.view(np.int32)
    low = np.int32(branches - 1)
    for s in range(count):
        d = x[0] - table[s]
        costs[s] = d * d * weights[0]
    for t in range(1, steps):
        if width == 1:
            _least_of_2(cost_bits, least_bits)
        elif width == 2:
            _least_of_4(cost_bits, least_bits)
        elif width == 3:
            _least_of_8(cost_bits, least_bits)
        else:
            _least_of_many(cost_bits, least_bits, branches)
        row = before[t]
        for m in range(ends):
            row[m] = np.uint8(least_bits[m] & low)
        if t % RESET == 0:
            smallest = least[0]
            for m in range(ends):
                smallest = min(smallest, least[m])
            for m in range(ends):
                least[m] -= smallest
        value, weight = x[t], weights[t]
        for q in range(branches):
            levels, out = table[q * ends : (q + 1) * ends], costs[q * ends : (q + 1) * ends]
            for m in range(ends):
                d = value - levels[m]
                out[m] = least[m] + d * d * weight
    state = 0
    for s in range(count):
        if costs[s] < costs[state]:
            state = s
    for t in range(steps - 1, -1, -1):
        states[t] = state
        if t > 0:
            m = state & (ends - 1)
            state = (m << width) | np.int64(before[t, m])


class Search:
    """Viterbi's algorithm for columns of one length, with its memory, which a thread uses again and again."""

    def __init__(self, steps: int, length: int) -> None:
        self._length = length
        self._costs = np.empty(1 << length, np.float32)
        self._least = np.empty(1 << (length - 1), np.float32)
        self._before = np.empty(steps << (length - 1), np.uint8)
        self.states = np.empty(steps, np.int32)

    def __call__(self, x: np.ndarray, weights: np.ndarray, table: np.ndarray, width: int) -> np.ndarray:
        """The states whose levels are nearest to `x` (steps,): int32, valid until the next call.

        The squared error of each step counts by its weight, from `weights` (steps,).
        """
        ends = 1 << (self._length - width)
        before = self._before[: len(x) * ends].reshape(len(x), ends)
        _search(x, weights, table, width, self._length, self._costs, self._least[:ends], before, self.states[: len(x)])
        return self.states[: len(x)]


@strict
def _write(states, width, length, words, begin):  # type: ignore[no-untyped-def]
    for i in range(length):
        if (states[0] >> i) & 1:
            words[(begin + i) >> 5] |= np.uint32(1) << np.uint32((begin + i) & 31)
    for t in range(1, states.shape[0]):
        new = states[t] >> (length - width)
        first = begin + width * (t - 1) + length
        for i in range(width):
            if (new >> i) & 1:
                words[(first + i) >> 5] |= np.uint32(1) << np.uint32((first + i) & 31)


def write_stream(states: np.ndarray, width: int, length: int, words: np.ndarray, begin: int) -> None:
    """Write the stream of a column into `words`, uint32, from bit `begin` on. These bits must be zero before."""
    _write(states, width, length, words, begin)
