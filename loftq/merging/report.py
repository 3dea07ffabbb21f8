"""The report of a merge."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loftq.display import key_values, size


@dataclass(frozen=True)
class MergeReport:
    """The result of `merge`. `difference` is ‖after − before‖ / ‖before‖ of the logits of a few tokens, where they were
    compared; `lost` the share of the adapter that rounded zero-points lost.
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
        """Everything, as plain JSON values."""
        return {**asdict(self), "folder": str(self.folder), "notes": list(self.notes)}

    def table(self) -> str:
        """For a person."""
        rows = [("folder", str(self.folder)), ("merged", f"{self.layers} linears, --to {self.target}")]
        rows.append(("size", size(self.bytes)))
        if self.difference is not None:
            rows.append(("logits", f"differ by {self.difference:.2g} of their norm from the adapter's on its backbone"))
        if self.lost is not None:
            rows.append(("lost", loss_text(self.lost)))
        rows += [("time", f"{self.seconds:.1f} s"), *(("note", note) for note in self.notes)]
        return key_values(rows)


def loss_text(lost: float) -> str:
    """How much of an adapter rounded zero-points lose, in words. Above 1, rounding moves weights further than it."""
    if math.isinf(lost):
        return "what the backbone's zero-points say: the adapter adds nothing yet, and rounding moves the weights"
    if lost < 1:
        return f"{lost:.1%} of the adapter, by rounding zero-points"
    return f"all of the adapter: rounding zero-points moves the weights {lost:.3g} times as far as it does"
