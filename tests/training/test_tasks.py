"""Which model learns which task. Oracle: what transformers builds the model as."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from picos import save_pico
from rows import articles, sums, write_rows

from loftq.pipeline.source import find_source
from loftq.training.opening import quantizing_of
from loftq.training.settings import Settings

Run = Callable[..., Any]


@pytest.mark.parametrize(
    ("name", "model_task", "task", "problem"),
    [
        ("bert", "masked-lm", "sft", "is a masked-lm one: name another model"),
        ("bart", "seq2seq-lm", "clm", "is a seq2seq-lm one: choose one that it can do (sft, gsm8k, summarization)"),
    ],
)
def test_a_model_learns_what_it_was_made_for(
    name: str, model_task: str, task: str, problem: str, tmp_path: Path, run: Run
) -> None:
    folder = save_pico(name, model_task, tmp_path / name)
    data = write_rows(tmp_path / "rows.jsonl", [{**row, "text": "some text"} for row in sums(4)])
    result = run("train", folder, "--task", task, "--data", data, "--output", tmp_path / "out", "--quiet")
    assert result.exit_code == 2
    assert f"--task {task} needs a causal-lm" in result.stderr
    assert problem in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "model_task", "task", "built"),
    [
        ("bart", "feature-extraction", "summarization", "seq2seq-lm"),  # as facebook/bart-large names itself
        ("bart", "seq2seq-lm", "summarization", None),
        ("bert", "masked-lm", "classification", "sequence-classification"),
    ],
)
def test_a_model_is_built_with_the_head_of_its_task(
    name: str, model_task: str, task: str, built: str | None, tmp_path: Path
) -> None:
    folder = save_pico(name, model_task, tmp_path / name)
    data = write_rows(tmp_path / "rows.jsonl", articles(4))
    settings = Settings(model=str(folder), data=(str(data),), output=str(tmp_path / "out"), task=task)
    assert quantizing_of(settings, find_source(str(folder)))["task"] == built
