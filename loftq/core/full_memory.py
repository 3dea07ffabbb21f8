"""Memory that is full, which torch says in three ways."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from loftq.errors import LoftQError

_FULL = r"can't allocate memory|not enough memory|Cannot allocate memory"


@contextmanager
def explain_full_memory(cure: str) -> Iterator[None]:
    """Turn what says that memory is full into a LoftQError with what lowers the need."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not re.search(_FULL, str(error)):
            raise
        raise LoftQError(f"out of memory: {cure}") from error
