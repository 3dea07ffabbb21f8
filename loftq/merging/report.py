"""The report of a merge."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loftq.display import key_values, size


@dataclass(frozen=True)
class MergeReport:
    """The result of `merge`.

    `difference` is ‖after − before‖ / ‖before‖ of the logits of a few tokens, or None if they were not compared. `lost`
    is the part of the adapter that rounding of zero-points lost.
    """

    folder: Path
    target: str
    bytes: int
    layers: int
    difference: float | None
    lost: float | None
    notes: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {**asdict(self), "folder": str(self.folder), "notes": list(self.notes)}

    def table(self) -> str:
        """Return the figures as a table for a person."""
        rows = [("folder", str(self.folder)), ("merged", f"{self.layers} linears, --to {self.target}")]
        rows.append(("size", size(self.bytes)))
        if self.difference is not None:
            rows.append(("logits", f"differ by {self.difference:.2g} of their norm from those before the merge"))
        if self.lost is not None:
            rows.append(("lost", loss_text(self.lost)))
        rows += [("time", f"{self.seconds:.1f} s"), *(("note", note) for note in self.notes)]
        return key_values(rows)


def loss_text(lost: float) -> str:
    """Say in words how much of an adapter is lost by rounding zero-points.

    Above 1, rounding moves the weights further than the adapter does.
    """
    if math.isinf(lost):
        return "the exact zero-points of the backbone: the adapter adds nothing yet, and rounding moves the weights"
    if lost < 1:
        return f"{lost:.1%} of the adapter, by rounding zero-points"
    return f"all of the adapter: rounding zero-points moves the weights {lost:.3g} times as far as it does"
