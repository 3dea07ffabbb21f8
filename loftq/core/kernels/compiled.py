"""Compilation of loops over blocks for the CPU, and their distribution over threads.

A loop is compiled when it is first called, and numba is imported only then: it takes 50 MB, which a program that trains
on bitsandbytes' weights never needs.

Block sizes that are powers of two are compiled in as constants, because loops of known length are a quarter faster. The
work is cut into tiles of a few blocks that fit in the first-level cache. Every thread computes a tile in the same way,
so results do not depend on the number of threads. Reductions may be reordered (`reassoc`), but products may not be
fused with sums, so that a dequantized value is rounded as in bitsandbytes.
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
LANES = 8  # values that are reduced side by side; block sizes are multiples of it
TINY = np.float32(1e-38)  # stands for a scale of zero in divisions
_SHARES = 16  # shares of the work for each thread
_FEW = 1 << 17  # number of values up to which a single thread is as fast
_REORDERED = frozenset({"reassoc", "nnan", "nsz"})
_FUSED = frozenset({"contract"})
_compiling = RLock()


class Loop:
    """A function that is compiled when it is first called, together with the loops that it calls."""

    def __init__(self, function: Callable[..., None], fastmath: frozenset[str], defaults: tuple[int, ...] = ()):
        self.function = function
        self._fastmath, self._defaults = fastmath, defaults
        self._compiled: Callable[..., None] | None = None

    def __call__(self, *arguments: Any) -> None:
        (self._compiled or self.compile())(*arguments)

    def compile(self) -> Callable[..., None]:
        """Compile the function with numba, once, and return the compiled function."""
        with _compiling:
            if self._compiled is None:
                from numba import njit

                body = cast(FunctionType, self.function)
                called = {name: body.__globals__.get(name) for name in body.__code__.co_names}
                names = body.__globals__ | {
                    name: loop.compile() for name, loop in called.items() if isinstance(loop, Loop)
                }
                body = FunctionType(body.__code__, names, body.__name__, self._defaults)
                options = {"nogil": True, "error_model": "numpy", "fastmath": set(self._fastmath)}
                try:
                    self._compiled = njit(body, cache=True, **options)
                except RuntimeError:  # a cache cannot be written beside this file, nor in the home folder
                    self._compiled = njit(body, **options)
            return self._compiled


def compiled(function: Callable[..., None]) -> Loop:
    """Make a loop whose sums may be computed in any order."""
    return Loop(function, _REORDERED)


def strict(function: Callable[..., None]) -> Loop:
    """Make a loop whose sums are computed in the order in which they are written, since the order can change codes."""
    return Loop(function, frozenset())


def fused(function: Callable[..., None]) -> Loop:
    """Make a loop whose sums are computed in the order in which they are written, and products fused with them."""
    return Loop(function, _FUSED)


@cache
def for_block(function: Callable[..., None], block: int) -> Callable[..., None]:
    """Specialize `function` for a block size, which is its last argument and has a default.

    numba treats defaults as constants. Sizes that are not powers of two (whole rows), of which there may be many, share
    one compilation.
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
    os.register_at_fork(after_in_child=_threads.cache_clear)  # a fork inherits the pool without its threads


def over_blocks(blocks: int, block: int, work: Callable[[int, int], None]) -> None:
    """Run `work(first, last)` over all blocks, on as many threads as torch would use in this thread."""
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

    # This thread works too: an additional one would compete for the cores with torch's threads. Those keep spinning
    # for a while after every product, so that the other threads start late: therefore the shares are many and small.
    others = [_threads(threads - 1).submit(drain) for _ in range(threads - 1)]
    drain()
    for other in others:
        other.result()


def flat(tensor: torch.Tensor) -> np.ndarray:
    """The values of a contiguous tensor as a one-dimensional array that shares its memory."""
    return tensor.detach().view(-1).numpy()


def lent(tensor: torch.Tensor) -> np.ndarray:
    """The values of stored codes as an array that shares their memory. FSDP can free and fill that memory again.

    `Tensor.numpy` would make it impossible: after that call, torch refuses to resize the storage.
    """
    return np.from_dlpack(tensor.detach())
