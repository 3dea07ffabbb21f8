"""Chooses the batch on a device, the accumulation and the checkpointing, so that a training fits into memory.

The effective batch, the product of batch and accumulation, stays as asked, so that the examples of each step and, apart
from rounding, the result are the same on every device. What the user has set is never changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from loftq.display import size
from loftq.training.settings import BATCH, TrainSettings

_PART = 0.9  # of the free memory; the rest is for the program itself


@dataclass(frozen=True)
class Split:
    """How a step is computed: `batch_size` examples on each device, and so many times before a step."""

    batch_size: int
    gradient_accumulation: int
    gradient_checkpointing: bool

    def into(self, settings: TrainSettings) -> TrainSettings:
        """The settings with this split."""
        return replace(settings, **asdict(self))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        kept = " --gradient-checkpointing" if self.gradient_checkpointing else ""
        return f"--batch-size {self.batch_size} --gradient-accumulation {self.gradient_accumulation}{kept}"


def asked_split(settings: TrainSettings) -> Split:
    """The split of the settings, with the defaults where they leave it open."""
    return Split(
        settings.batch_size or BATCH, settings.gradient_accumulation or 1, bool(settings.gradient_checkpointing)
    )


def choose_split(
    settings: TrainSettings, need: Callable[[int, bool], int], free: int | None
) -> tuple[Split, str | None]:
    """Choose the first split that fits into `free` bytes, and return a line for the user if it is not the one asked.

    `need` gives the bytes that a training needs with a batch size, with or without checkpointing. Smaller batches are
    tried first, because checkpointing takes a third more time. If none fits, the one that needs the least is chosen.
    """
    asked = asked_split(settings)
    if free is None:
        return asked, None
    is_open = settings.batch_size is None and settings.gradient_accumulation is None
    batches = [asked.batch_size >> shift for shift in range(asked.batch_size.bit_length())] if is_open else []
    ways = (False, True) if settings.gradient_checkpointing is None else (asked.gradient_checkpointing,)
    splits = [
        Split(batch, asked.batch_size * asked.gradient_accumulation // batch, way)
        for way in ways
        for batch in batches or [asked.batch_size]
    ]
    needed = 0
    for split in splits:
        needed = need(split.batch_size, split.gradient_checkpointing)
        if needed <= _PART * free:
            if split == asked:
                return split, None
            return split, f"chosen to fit: {split} (about {size(needed)} of {size(free)} free; options override it)"
    return splits[-1], (
        f"about {size(needed)} are needed with {splits[-1]}, and only {size(free)} are free: training may run out of "
        "memory; lower --cutoff-len"
    )
