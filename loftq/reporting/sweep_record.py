"""`sweep.json` and `sweep.csv`: what a sweep measured, one row for each cell."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loftq.core.solvers.methods import METHODS
from loftq.errors import ArtifactError
from loftq.formats.disk import write_whole
from loftq.formats.links import refuse_links
from loftq.formats.schema import file_name, finite, json_text, number, one_of, read_json, whole

RECORD, TABLE, PAGE = "sweep.json", "sweep.csv", "report.html"
VERSION = 1
COMPLETE, FAILED, BEGUN = "complete", "failed", "begun"
_AGAIN = "remove it to begin the sweep again, or name another --output"
_FIGURE = (number(), None)
_ROW = {
    "cell": file_name,
    "bits": number(above=0, most=32),
    "rank": whole(1),
    "method": one_of(METHODS),
    "seed": whole(0, 2**63),
    "status": one_of((COMPLETE, FAILED, BEGUN)),
    "problem?": str,
    "start_perplexity?": _FIGURE,
    "trained_perplexity?": _FIGURE,
}
_SCHEMA = {
    "format_version": whole(1),
    "model": str,
    "settings": dict,
    "versions": {str: str},
    "devices": {str: str},
    "full_precision": dict,
    "cells": [_ROW],
}
_COLUMNS = (  # of the table, those that some cell has a value for
    *("cell", "bits", "rank", "method", "seed", "status"),
    *("bits_per_weight", "backbone_bytes", "adapter_bytes"),
    *("plain_error", "weight_error", "output_plain_error", "output_error", "divergence"),
    *("start_perplexity", "trained_perplexity", "full_precision_perplexity"),
    *("train_loss", "held_out_loss", "train_steps", "quantize_seconds", "train_seconds", "problem"),
)


def read_sweep(folder: Path) -> dict[str, Any] | None:
    """The record of a sweep in a folder; None if there is none. Raises ArtifactError for a damaged one."""
    path = folder / RECORD
    if not path.is_file():
        return None
    refuse_links(folder, [RECORD, TABLE, PAGE], ArtifactError)
    record: dict[str, Any] = read_json(path, {"format_version": whole(1)}, advice=_AGAIN)
    if record["format_version"] > VERSION:
        raise ArtifactError(f"{path} has format version {record['format_version']}, not {VERSION}: upgrade loftq")
    return dict(read_json(path, _SCHEMA, advice=_AGAIN))


def write_sweep(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record and its table."""
    write_whole(folder / RECORD, json_text(finite(record), indent=1) + "\n")
    full = record["full_precision"].get("perplexity")
    facts = {"model": record["model"], **{f"{kind}_device": name for kind, name in record["devices"].items()}}
    facts |= {f"{name}_version": version for name, version in record["versions"].items()}
    rows = [{**row, "full_precision_perplexity": full, **facts} for row in record["cells"]]
    write_whole(folder / TABLE, csv_text(rows, (*_COLUMNS, *facts)))


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Iterable[str]) -> str:
    """Rows as a table with commas, of the columns for which some row has a value."""
    shown = [name for name in columns if any(row.get(name) is not None for row in rows)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(shown)
    writer.writerows([row.get(name) for name in shown] for row in rows)
    return text.getvalue()
