"""Arguments of TrainingArguments. Oracle: the fields of the installed transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from rows import sums, write_rows
from transformers import TrainingArguments

import loftq
from loftq.errors import OptionError
from loftq.secrets import is_secret_name
from loftq.training.other_arguments import check_set

Run = Callable[..., Any]
SECRET = "hf_SECRET"


def test_every_secret_of_transformers_is_refused() -> None:
    names = [entry.name for entry in fields(TrainingArguments) if is_secret_name(entry.name)]
    assert "hub_token" in names
    for name in names:
        with pytest.raises(OptionError, match=f"--set {name}: holds a secret"):
            check_set({name: SECRET})


@pytest.mark.parametrize(
    "argument",
    [
        f"hub_token={SECRET}",
        "hub_token=123456",
        f"push_to_hub_token={SECRET}",
        json.dumps({"token": SECRET}).join(["accelerator_config=", ""]),
        f"lr_scheduler_kwargs={json.dumps({'inner': [{'api_key': SECRET}]})}",
        f"optim_args=password={SECRET}",
        "run_name=https://me:hf_SECRET@host/x",
    ],
)
def test_a_secret_is_neither_taken_nor_shown(argument: str, pico: Path, tmp_path: Path, run: Run) -> None:
    """Before anything is written or read."""
    data = write_rows(tmp_path / "data.jsonl", sums(4))
    refused = run("train", pico, "--data", data, "--output", tmp_path / "out", "--set", argument)
    assert refused.exit_code == 2
    assert "holds a secret" in refused.stderr
    assert "hf auth login" in refused.stderr
    assert "SECRET" not in refused.stderr + refused.stdout
    assert not (tmp_path / "out").exists()


def test_a_secret_in_a_recipe_file_is_not_shown(pico: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "run.yaml").write_text(f"model: {pico}\ndata: d.jsonl\noutput: o\nset:\n  hub_token: {SECRET}\n")
    refused = run("train", "--recipe", tmp_path / "run.yaml")
    assert "--set hub_token: holds a secret" in refused.stderr
    (tmp_path / "run.yaml").write_text(f"model: {pico}\nset:\n  hub_token: {SECRET}: x\n")
    broken = run("train", "--recipe", tmp_path / "run.yaml")
    assert "line 3: not YAML" in broken.stderr
    assert "SECRET" not in refused.stderr + broken.stderr


def test_a_name_of_a_wrong_kind_is_refused() -> None:
    for name, match in (("output_dir", "use the option --output"), ("remove_unused_columns", "cannot be changed")):
        with pytest.raises(OptionError, match=f"--set {name}: {match}"):
            loftq.train("model", data="d.jsonl", output="out", set={name: 1})
