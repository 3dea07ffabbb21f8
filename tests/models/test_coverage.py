"""The table of `loftq families`: each row is what a small model of the type does.

Covers: loftq/models/coverage.py, cli/families.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grids import thinned
from type_coverage import cases, examine

from loftq.models import coverage
from loftq.models.families import FAMILIES, family_of

QUICK = {("whisper", "speech-seq2seq"), ("hubert", "ctc"), ("qwen3", "sequence-classification"), ("rwkv", "causal-lm")}

UNUSED = {"siglip"}  # its classifier takes the mean over the image, and leaves out the head that pools it


def test_the_rows_are_those_of_all_cases() -> None:
    assert [(row["group"], row["type"], row["task"]) for row in coverage.rows()] == list(cases())
    assert len(coverage.types()) >= 70
    assert set(FAMILIES) <= set(coverage.types())
    for family in FAMILIES.values():
        assert set(family.tasks) <= {row["task"] for row in coverage.rows_of(family.model_type)}


@pytest.mark.parametrize("row", coverage.rows(), ids=lambda row: f"{row['type']}-{row['task']}")
def test_a_type_is_refused_or_starts_nearer_and_trains(row: dict[str, Any]) -> None:
    if "refused" in row:
        assert "\n" not in row["refused"]
        return
    assert row["nearer"] < 1
    complete = row["trains"][0] == row["trains"][1] > 0
    assert complete != (row["type"] in UNUSED)
    assert row["kept"] is None or 0 < row["kept"] < 1
    assert (row["loads"] == "stock") == family_of(row["type"]).stock or row["type"] not in FAMILIES


@pytest.mark.parametrize(
    ("group", "kind", "task"), thinned(cases(), lambda _, kind, task: (kind, task) in QUICK), ids=str
)
def test_a_row_is_true(group: str, kind: str, task: str, tmp_path: Path) -> None:
    """Oracle: the full-precision model, stock transformers and peft, torch's gradients."""
    (recorded,) = (row for row in coverage.rows_of(kind) if row["task"] == task)
    found = examine(group, kind, task, tmp_path)
    assert found.pop("nearer", 0) < 1
    assert found == {key: value for key, value in recorded.items() if key != "nearer"}


def test_the_table_is_that_of_the_rows(run: Callable[..., Any]) -> None:
    rows = json.loads(run("families", "--json").stdout)
    assert [row["model type"] for row in rows] == [*coverage.types(), "any other"]
    whisper = next(row for row in rows if row["model type"] == "whisper")
    assert (whisper["loader"], whisper["nearer"], whisper["trains"], whisper["tested"]) == ("stock", True, "yes", True)
    assert next(row for row in rows if row["model type"] == "rwkv")["loader"] == "no"
    falcon = run("families", "falcon", "--wide").stdout.splitlines()
    assert falcon[1].split()[:5] == ["falcon", "yes", "loftq", "yes", "yes"]
    assert run("families", "quokka", "--wide").stdout.splitlines()[1].split()[:2] == ["quokka", "no"]
