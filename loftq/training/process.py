"""What running a model needs around it: silence, and errors that say what to do."""

from __future__ import annotations

from functools import partial

from transformers.utils import logging

from loftq.models.devices import explain_full_memory


def hush(quiet: bool) -> None:
    """No progress bars of the libraries."""
    if quiet:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            import datasets
        except ImportError:
            return
        datasets.disable_progress_bars()


explain_memory = partial(
    explain_full_memory,
    "lower --batch-size or --cutoff-len; in training, raise --gradient-accumulation as much, and add "
    "--gradient-checkpointing; `loftq train --dry-run` shows what a run needs",
)
