"""Keeps what training holds and what it throws away apart in memory, on CPUs whose C library is glibc.

The forward pass leaves tensors for the backward pass between temporaries of all sizes. glibc serves blocks of up to
32 MB from one heap once such blocks were freed, and a heap with holes between blocks that live on cannot shrink: it
grows to twice what is in it. Blocks with pages of their own are returned as soon as they are freed, at the price of new
pages for each: the smaller they are, the more of the time goes into pages.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

OWN_PAGES = 1 << 22  # bytes of a block from which it has pages of its own
_USUAL = 1 << 25  # the largest value that glibc gives the threshold by itself, and so the value after a while
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


@contextmanager
def own_pages(device: torch.device) -> Iterator[None]:
    """Give large blocks pages of their own while a model trains on a CPU. Elsewhere, nothing changes."""
    library = ctypes.CDLL(None)
    if device.type != "cpu" or not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, OWN_PAGES)
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, _USUAL)


def return_freed(device: torch.device) -> None:
    """Return the heap's free pages to the system, those in holes too. The next step may need them elsewhere."""
    library = ctypes.CDLL(None)
    if device.type == "cpu" and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
