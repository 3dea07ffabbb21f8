"""Viterbi's search on a GPU (`core.trellis`): a Triton kernel that searches windows of a column side by side.

A path goes through all outputs of a column, so that the search is sequential. But where a path is at some output hardly
depends on outputs that are far from it. So the search has two passes. The first one finds the state at each boundary
between chunks, in a window that reaches a few steps to both sides. The second one searches all chunks at once, each
from the state at its beginning to the state at its end. The path is one through the whole column, and its error is that
of the best path within a few thousandths. A column of a single chunk gets the best path.

Costs are computed in the order of the CPU's loop (`viterbi`), and hold the state before in their lowest bits as there.

Import this module only where `dispatch.on_gpu` says that there is Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from loftq.core.kernels.viterbi import RESET

CHUNK, OVERLAP = 128, 32  # steps of a chunk, and steps on both sides of a boundary
_FREE = -1  # in the place of a state that is not given


@triton.jit
def _search(  # type: ignore[no-untyped-def]
    x,
    weights,
    levels,
    firsts,
    counts,
    starts,
    stops,
    before,
    states,
    LONGEST: tl.constexpr,
    WIDTH: tl.constexpr,
    LENGTH: tl.constexpr,
    RESET: tl.constexpr,
):
    # Each program searches a window of `counts` steps from `firsts` on, between the states `starts` and `stops`.
    # `before` (programs, LONGEST, ends) is uint8 to work in; `states` (programs, LONGEST) is int16.
    STATES: tl.constexpr = 1 << LENGTH
    BRANCHES: tl.constexpr = 1 << WIDTH
    ENDS: tl.constexpr = STATES >> WIDTH
    program = tl.program_id(0)
    first, count = tl.load(firsts + program), tl.load(counts + program)
    start, stop = tl.load(starts + program), tl.load(stops + program)
    every, ends = tl.arange(0, STATES), tl.arange(0, ENDS)
    low = tl.arange(0, BRANCHES)[None, :]
    table = tl.load(levels + every)
    apart = tl.load(x + first) - table
    costs = apart * apart * tl.load(weights + first)
    costs = tl.where((start >= 0) & (every != start), 1e30, costs)
    table = tl.reshape(table, [BRANCHES, ENDS])
    rows = before + program.to(tl.int64) * LONGEST * ENDS
    for t in range(1, LONGEST):
        inside = t < count
        bits = tl.reshape(costs.to(tl.int32, bitcast=True), [ENDS, BRANCHES])
        marked = tl.min((bits & -BRANCHES) | low, axis=1)
        tl.store(rows + t * ENDS + ends, (marked & (BRANCHES - 1)).to(tl.uint8))
        least = marked.to(tl.float32, bitcast=True)
        if t % RESET == 0:
            least -= tl.min(least, axis=0)
        value = tl.load(x + first + t, mask=inside, other=0.0)
        weight = tl.load(weights + first + t, mask=inside, other=0.0)
        d = value - table
        costs = tl.where(inside, tl.reshape(least[None, :] + d * d * weight, [STATES]), costs)
    best = tl.argmin(costs, axis=0)
    state = tl.where(stop >= 0, stop, best).to(tl.int32)
    tl.debug_barrier()  # all threads read what all have stored
    for i in range(LONGEST):
        t = LONGEST - 1 - i
        inside = t < count
        tl.store(states + program * LONGEST + t, state.to(tl.int16), mask=inside)
        end = state & (ENDS - 1)
        branch = tl.load(rows + t * ENDS + end, mask=inside & (t > 0), other=0).to(tl.int32)
        state = tl.where(inside & (t > 0), (end << WIDTH) | branch, state)


class Search:
    """Viterbi's search for columns of one length: the interface of `viterbi.Search`, with tensors."""

    def __init__(self, steps: int, length: int, device: torch.device) -> None:
        self._steps, self._length = steps, length
        chunks = max(triton.cdiv(steps - OVERLAP, CHUNK), 1)
        edges = torch.arange(1, chunks) * CHUNK  # the boundaries between chunks
        firsts = torch.cat([edges.new_zeros(1), edges])
        lasts = torch.cat([edges + 1, edges.new_tensor([steps])])  # a chunk ends where the next one begins
        around = (edges - OVERLAP, torch.full_like(edges, 2 * OVERLAP))
        self._around = [each.to(device, torch.int32) for each in around]
        self._chunks = [each.to(device, torch.int32) for each in (firsts, lasts - firsts)]
        self._longest = int((lasts - firsts).max())
        ends = 1 << (length - 1)
        self._before = torch.empty(chunks * max(self._longest, 2 * OVERLAP) * ends, dtype=torch.uint8, device=device)
        free = torch.full((chunks,), _FREE, dtype=torch.int32, device=device)
        self._free = free

    def __call__(self, x: torch.Tensor, weights: torch.Tensor, table: torch.Tensor, width: int) -> torch.Tensor:
        """The states whose levels are near to `x` (steps,): int16, for `weights` (steps,) of the squared errors."""
        column, edges = (x.contiguous(), weights, table), self._free[1:]
        if len(edges):
            found = self._windows(column, width, *self._around, edges, edges, 2 * OVERLAP)
            edges = found[:, OVERLAP].int()
        starts, stops = torch.cat([self._free[:1], edges]), torch.cat([edges, self._free[:1]])
        found = self._windows(column, width, *self._chunks, starts, stops, self._longest)
        last = int(self._steps - (len(found) - 1) * CHUNK)
        return torch.cat([found[:-1, :CHUNK].reshape(-1), found[-1, :last]])

    def _windows(self, column: tuple[torch.Tensor, ...], width: int, *windows: Any) -> torch.Tensor:
        *arrays, longest = windows
        states = torch.empty(len(arrays[0]), longest, dtype=torch.int16, device=column[0].device)
        sizes = {"LONGEST": longest, "WIDTH": width, "LENGTH": self._length, "RESET": RESET}
        _search[len(states),](*column, *arrays, self._before, states, **sizes, enable_fp_fusion=False)
        return states
