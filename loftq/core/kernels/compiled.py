"""How loops over blocks are compiled for the CPU, and shared out among threads.

A loop is compiled when it is first called, and numba imported then: 50 MB that a program which trains on
bitsandbytes' weights never needs.

Block sizes that are powers of two are compiled in: loops of known length are a quarter faster. The work is cut into
tiles of a few blocks that stay in the first-level cache; every tile is computed the same way whichever thread it
falls to, so results do not depend on the number of threads. Reductions may be reordered (`reassoc`), products may
not be fused: a dequantized value is rounded as in bitsandbytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from threading import Lock, RLock
from types import FunctionType
from typing import Any, cast

import numpy as np
import torch

TILE = 1024  # values: two float32 buffers of this length fit in any first-level cache
LANES = 8  # of which a block has a multiple
TINY = np.float32(1e-38)
_SHARES = 16  # of the work, a thread
_FEW = 1 << 17  # values, up to which one thread is as fast
_REORDERED = frozenset({"reassoc", "nnan", "nsz"})
_compiling = RLock()


class Loop:
    """A function that is compiled when it is first called, with the loops that it calls."""

    def __init__(self, function: Callable[..., None], fastmath: frozenset[str], defaults: tuple[int, ...] = ()):
        self.function = function
        self._fastmath, self._defaults = fastmath, defaults
        self._compiled: Callable[..., None] | None = None

    def __call__(self, *arguments: Any) -> None:
        (self._compiled or self.compile())(*arguments)

    def compile(self) -> Callable[..., None]:
        """What numba makes of it."""
        with _compiling:
            if self._compiled is None:
                from numba import njit

                body = cast(FunctionType, self.function)
                called = {name: body.__globals__.get(name) for name in body.__code__.co_names}
                known = body.__globals__ | {
                    name: loop.compile() for name, loop in called.items() if isinstance(loop, Loop)
                }
                body = FunctionType(body.__code__, known, body.__name__, self._defaults)
                options = {"nogil": True, "error_model": "numpy", "fastmath": set(self._fastmath)}
                try:
                    self._compiled = njit(body, cache=True, **options)
                except RuntimeError:  # neither beside this file nor at home a cache can be written
                    self._compiled = njit(body, **options)
            return self._compiled


def compiled(function: Callable[..., None]) -> Loop:
    """A loop whose sums may be taken in another order."""
    return Loop(function, _REORDERED)


def strict(function: Callable[..., None]) -> Loop:
    """A loop whose sums are taken as written: where another order would decide another way."""
    return Loop(function, frozenset())


@cache
def for_block(function: Callable[..., None], block: int) -> Callable[..., None]:
    """`function` for one block size, which is its last argument and has a default.

    numba takes defaults as constants; sizes of which there are many (whole rows) share one compilation.
    """
    if block & (block - 1):
        loop = _for_any_block(function)
        return lambda *arguments: loop(*arguments, block)
    return Loop(function, _REORDERED, (block,))


@cache
def _for_any_block(function: Callable[..., None]) -> Loop:
    return compiled(function)


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="loftq-kernel")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # a fork has its parent's pool, without the threads


def over_blocks(blocks: int, block: int, work: Callable[[int, int], None]) -> None:
    """Run `work(first, last)` over all blocks, on as many threads as torch would use here."""
    threads = torch.get_num_threads()
    if threads == 1 or blocks * block < _FEW:
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


def flat(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous tensor's values as one long array, shared."""
    return tensor.detach().view(-1).numpy()
