"""The figures of a report for other programs: as rows with commas, and as JSON with the errors of each layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.formats.schema import finite, json_text
from loftq.reporting.measured import Measured
from loftq.reporting.sweep_record import csv_text

_SETTINGS = ("bits", "quant_type", "rank", "method", "iters", "seed", "calibration")
_LAYER = ("name", "shape", "codebook", "bits_per_weight", "plain_error", "error", "output_plain_error", "output_error")
_ABOVE = re.compile(r"(?<![\w.~:/])/(?:[^\s/,;:'\"()]+/)+")


def without_folders(text: str) -> str:
    """A text in which an absolute path is only its last part: a page is shown to others."""
    return _ABOVE.sub("", text)


@dataclass(frozen=True)
class Figures:
    """The figures of the compared artifacts, a row for each."""

    rows: Sequence[dict[str, Any]]
    layers: Sequence[Sequence[dict[str, Any]]]

    def csv(self) -> str:
        """The rows as a table with commas."""
        return csv_text(self.rows, dict.fromkeys(name for row in self.rows for name in row))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        pairs = zip(self.rows, self.layers, strict=True)
        return {"artifacts": [{**row, "layers": list(layers)} for row, layers in pairs]}

    def json(self) -> str:
        """The same as a text."""
        return json_text(finite(self.to_dict()))


def figures(artifacts: Sequence[Measured]) -> Figures:
    """The figures of artifacts: settings, totals, perplexities, versions and device."""
    rows = []
    for measured in artifacts:
        manifest = measured.artifact.manifest
        recipe, totals = manifest["recipe"], dict(measured.totals)
        settings = {name: recipe.get(name) for name in _SETTINGS}
        if settings["calibration"] is not None:
            settings["calibration"] = Path(str(settings["calibration"])).name
        perplexity = {f"{name}_perplexity": value for name, value in measured.perplexity.items()}
        versions = {f"{name}_version": value for name, value in manifest.get("versions", {}).items()}
        head = {"folder": measured.folder, "label": measured.label, "model": Path(manifest["source"]["model"]).name}
        rows.append({**head, **settings, **totals, **perplexity, **versions})
    layers = [[{key: row[key] for key in _LAYER if key in row} for row in measured.rows] for measured in artifacts]
    return Figures(rows, layers)
