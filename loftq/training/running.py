"""What running a model needs around it: silence, and errors that say what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging

from loftq.errors import LoftQError

_FULL = r"can't allocate memory|not enough memory|Cannot allocate memory"


def hush(quiet: bool) -> None:
    """No progress bars of the libraries."""
    if quiet:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            import datasets
        except ImportError:
            return
        datasets.disable_progress_bars()


@contextmanager
def explain_memory() -> Iterator[None]:
    """Turn what says that memory is full into a LoftQError with what lowers the need."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not re.search(_FULL, str(error)):
            raise
        raise LoftQError(
            "out of memory: lower --batch-size or --cutoff-len; in training, raise --gradient-accumulation as much, "
            "and add --gradient-checkpointing; `loftq train --dry-run` shows what a run needs"
        ) from error
