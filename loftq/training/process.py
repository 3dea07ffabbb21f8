"""Hides progress bars while a model runs, and explains errors from full memory."""

from __future__ import annotations

from functools import partial

from transformers.utils import logging

from loftq.models.devices import explain_full_memory


def hush(quiet: bool) -> None:
    """With `quiet`, hide the progress bars of transformers and datasets."""
    if quiet:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            import datasets
        except ImportError:
            return
        datasets.disable_progress_bars()


explain_memory = partial(
    explain_full_memory,
    "lower --batch-size or --cutoff-len; in training, raise --gradient-accumulation by the same factor and add "
    "--gradient-checkpointing; `loftq train --dry-run` shows how much memory a run needs",
)
