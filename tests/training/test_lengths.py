"""What a dry run says of the data. Oracle: the rows themselves, of which each character is a token.

Covers: loftq/training/prepare.py, loftq/training/pace.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Result
from hub import Hub, client_of, serve
from picos import save_pico
from rows import articles, reviews, sums, write_rows

import loftq
from loftq.errors import OptionError
from loftq.models.tasks import build_meta
from loftq.training import pace, quantize_first, train
from loftq.training.estimate import Estimate, estimate
from loftq.training.lengths import padded_tokens
from loftq.training.pace import operations

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _no_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_SECONDS", 0.0)


def planned(model: Path, rows: list[dict[str, Any]], folder: Path, **options: Any) -> Estimate:
    data = str(write_rows(folder / "rows.jsonl", rows))
    fixed: dict[str, Any] = {"data": data, "output": "unwritten", "rank": 4, "adapter": "lora", "cpu": True}
    return estimate(str(model), **{**fixed, **options})


def test_a_dry_run_shows_the_data(pico: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"{i}?", "response": "x" * (10 + i), "id": i, "input": "", "score": 1.0} for i in range(40)
    ]
    found = planned(pico, rows, tmp_path, cutoff_len=60, epochs=2)
    whole = [len("user: ?\nassistant: \n") + len(str(i)) + 10 + i for i in range(40)]
    assert (found.data.rows, found.data.examples, found.data.held_out) == (40, 38, 2)
    assert list(found.data.used) == ["prompt", "response", "input"]
    assert list(found.data.unused) == ["id", "score"]
    lengths = found.data.lengths
    assert lengths.mean == pytest.approx(np.mean(whole))
    assert (lengths.longest, lengths.most_of_95) == (max(whole), sorted(whole)[38])
    assert lengths.cut_off == sum(size > 60 for size in whole) / 40
    assert found.batch == (8, 60)
    assert found.steps == 10  # 38 examples, 8 at a time, twice
    assert found.seconds > 0
    first = found.data.example
    assert first.startswith("user: ")
    assert first.count("⟦") == first.count("⟧") == 1
    assert first.partition("⟦")[2].replace("x", "") == "assistant: \n⟧"
    for line in ("columns not used  id, score", "40 rows: 38 examples", "10 steps with --batch-size 8", first):
        assert line in found.table()
    record = loftq.train(
        str(pico), data=str(tmp_path / "rows.jsonl"), output=tmp_path / "out", rank=4, adapter="lora", epochs=0.1,
        quiet=True, cutoff_len=60,
    )  # fmt: skip
    again = planned(pico, rows, tmp_path, cutoff_len=60, epochs=0.1)
    assert (again.steps, again.data.examples, again.trainable) == (record.steps, record.examples, record.trainable)


def test_the_memory_follows_the_real_lengths(pico: Path, tmp_path: Path) -> None:
    short = planned(pico, sums(16), tmp_path)
    long = planned(pico, [{"prompt": "?", "response": "x" * 100}] * 16, tmp_path)
    assert short.batch[1] < 50 < long.batch[1] <= 128
    assert short.activations < long.activations
    assert short.weights == long.weights


def test_limits_of_prompts_and_answers_cut_too(pico: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "p" * size, "response": "r" * 10} for size in (5, 50)]
    found = planned(pico, rows, tmp_path, chat_template=False, max_source_length=20)
    assert found.data.lengths.cut_off == 0.5


def test_other_tasks(pico: Path, tmp_path: Path) -> None:
    text = planned(pico, [{"text": "word " * 60, "url": "x"}] * 4, tmp_path, task="clm", cutoff_len=100)
    assert text.data.lengths.mean == text.batch[1] == 100
    assert list(text.data.unused) == ["url"]
    bert = save_pico("bert", "masked-lm", tmp_path / "bert")
    labelled = planned(bert, reviews(8), tmp_path, task="classification", dtype="float32")
    assert "label ⟦" in labelled.data.example
    bart = save_pico("bart", "seq2seq-lm", tmp_path / "bart")
    summed = planned(bart, articles(8), tmp_path, task="summarization", dtype="float32")
    assert "⟦" in summed.data.example
    assert list(summed.data.used) == ["document", "summary"]


def test_data_are_read_before_anything_is_quantized_or_loaded(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("too early")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quantize_first, "quantize", never)
    monkeypatch.setattr(train, "open_to_train", never)
    bad = [{"ask": "a", "tell": "b"}], [{"prompt": "a", "response": None}], [{"prompt": "a", "response": "b"}] * 4
    problems = ("the data has no column for the prompt", "row 1: column 'response' of the data holds None", None)
    for rows, problem in zip(bad, problems, strict=True):
        data = str(write_rows(tmp_path / "rows.jsonl", rows))
        raised, said = (AssertionError, "too early") if problem is None else (OptionError, problem)
        with pytest.raises(raised, match=said):
            loftq.train(str(pico), data=data, output="out", rank=4, quiet=True)
    assert not Path("out").exists()
    assert not Path("model_zoo").exists()


def test_a_dry_run_downloads_no_weights(pico: Path, tmp_path: Path, run: Run) -> None:
    """Oracle: what the server was asked for."""
    data = write_rows(tmp_path / "rows.jsonl", sums(8))
    with serve(Hub()) as hub, client_of(hub.endpoint, tmp_path / "hf"):
        hub.add("user/model", pico)
        ended = run("train", "user/model", "--data", data, "--output", "out", "--rank", 4, "--dry-run", "--json")
        assert ended.exit_code == 0, ended.stderr
        weights = [
            request for request in hub.requests if request.path.endswith(".safetensors") and request.method == "GET"
        ]
        assert all("range" in request.headers for request in weights)
    assert json.loads(ended.stdout)["data"]["rows"] == 8


def test_padding_is_counted_with_its_batch() -> None:
    lengths = np.array([1, 1, 1, 9])
    assert padded_tokens(lengths, 4, seed=0) == 36
    assert padded_tokens(lengths, 1, seed=0) == 3


def test_operations_are_those_of_the_matrices(pico: Path) -> None:
    """Oracle: torch's own count of a forward pass, of which a training on frozen weights takes two."""
    from torch.utils.flop_counter import FlopCounterMode

    model, _ = build_meta(pico)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64, device="meta"))
    assert operations(model, 4, checkpointing=False) == pytest.approx(2 * counter.get_total_flops(), rel=0.05)
