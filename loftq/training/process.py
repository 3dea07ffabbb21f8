"""Explains errors from full memory, in training and in what runs a model."""

from __future__ import annotations

from functools import partial

from loftq.models.devices import explain_full_memory

explain_memory = partial(
    explain_full_memory,
    "lower --batch-size or --cutoff-len; in training, raise --gradient-accumulation by the same factor and add "
    "--gradient-checkpointing; `loftq train --dry-run` shows how much memory a run needs",
)
