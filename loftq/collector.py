"""Pauses Python's collector of cycles while a verb builds large tables that it needs to the end."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """Keep the collector of cycles from running in the block.

    With many objects that live on, the collector searches all of them again and again and finds nothing, so that the
    time for each of them grows with their number. Objects without references to themselves are still freed at once.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
