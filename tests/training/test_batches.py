"""Batches that fit. Oracles: the estimate of each candidate, and a training whose options say the same.

Covers: loftq/training/memory.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from picos import dtype_of, save_pico
from rows import sums, write_rows
from safetensors.torch import load_file

import loftq
from loftq.errors import OutputError
from loftq.models.tasks import build_meta
from loftq.training import memory
from loftq.training.batches import Split, asked_split, choose_split
from loftq.training.memory import most_bytes, on_meta
from loftq.training.model import find_model
from loftq.training.settings import TrainSettings

NEEDS = {False: 100, True: 10}  # bytes of an example, without and with checkpointing


def need(batch: int, checkpointing: bool) -> int:
    return 50 + batch * NEEDS[checkpointing]


@pytest.mark.parametrize(
    ("asked", "free", "chosen"),
    [
        ({}, 1000, (8, 1, False)),
        ({}, 600, (4, 2, False)),
        ({}, 170, (1, 8, False)),
        ({}, 160, (8, 1, True)),
        ({}, 120, (4, 2, True)),
        ({}, 10, (1, 8, True)),
        ({"batch_size": 8}, 600, (8, 1, True)),
        ({"batch_size": 6, "gradient_accumulation": 2}, 10, (6, 2, True)),
        ({"gradient_accumulation": 4}, 160, (8, 4, True)),
        ({"gradient_checkpointing": False}, 10, (1, 8, False)),
        ({"gradient_checkpointing": True}, 1000, (8, 1, True)),
        ({"gradient_checkpointing": True}, 80, (2, 4, True)),
    ],
)
def test_the_first_that_fits_is_chosen(asked: dict[str, Any], free: int, chosen: tuple[int, int, bool]) -> None:
    settings = TrainSettings(model="m", data=("d",), output="o", **asked)
    split, said = choose_split(settings, need, free)
    assert split == Split(*chosen)
    start = asked_split(settings)
    assert split.batch_size * split.gradient_accumulation == start.batch_size * start.gradient_accumulation
    fits = need(split.batch_size, split.gradient_checkpointing) <= 0.9 * free
    assert (said is None) == (fits and split == start)
    assert said is None or ("chosen to fit: " in said) == fits
    for option, value in asked.items():
        assert getattr(split, option) == value
    assert choose_split(settings, need, None) == (start, None)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_the_quick_bound_is_above_the_count(name: str, tmp_path: Path) -> None:
    folder = save_pico(name, "causal-lm", tmp_path / "model")
    settings = TrainSettings(model=str(folder), data=("d",), output="o", adapter="lora", rank=4)
    for tokens in (16, 128):
        planned = on_meta(settings, find_model(str(folder)), dtype_of(name))
        device = torch.device("cpu")
        counted = planned.weights + planned.adapter_bytes(settings, device)
        counted += planned.activations(settings, (8, tokens), device, checkpointing=False)
        assert most_bytes(build_meta(folder)[0], (8, tokens)) > counted


def test_a_small_memory_trains_the_same(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are those of the batch that was asked, and a resumed run keeps the split."""
    data = str(write_rows(tmp_path / "sums.jsonl", sums(24)))
    fast: dict[str, Any] = {"data": data, "adapter": "lora", "rank": 4, "max_steps": 2, "quiet": True}
    fast |= {"learning_rate": 1e-2, "dtype": "float32", "cpu": True, "optim": "sgd"}
    loftq.train(str(pico), output=tmp_path / "whole", **fast)
    settings = TrainSettings(model=str(pico), data=(data,), output="o", adapter="lora", rank=4, optim="sgd")
    planned = on_meta(settings, find_model(str(pico)), torch.float32)
    record = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert record["split"] == {"batch_size": 8, "gradient_accumulation": 1, "gradient_checkpointing": False}
    longest = 42  # tokens of the longest example
    fixed = planned.weights + planned.adapter_bytes(settings, torch.device("cpu"))
    kept = planned.activations(settings, (2, longest), torch.device("cpu"), checkpointing=False)
    monkeypatch.setattr(memory, "free_memory", lambda _: int((fixed + kept) / 0.9) + 1)
    loftq.train(str(pico), output=tmp_path / "small", **fast)
    record = json.loads((tmp_path / "small" / "training.json").read_text())
    assert record["split"] == {"batch_size": 2, "gradient_accumulation": 4, "gradient_checkpointing": False}
    assert "batch_size" not in record["settings"]
    whole, small = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "small"))
    start = 0.0
    for name, value in whole.items():
        torch.testing.assert_close(small[name], value, rtol=1e-3, atol=1e-6)
        start = max(start, float(value.abs().max()))
    assert start > 0

    unfinished = {key: value for key, value in record.items() if key != "result"}
    (tmp_path / "small" / "training.json").write_text(json.dumps(unfinished))
    monkeypatch.setattr(memory, "free_memory", lambda _: 1 << 50)
    loftq.train(str(pico), output=tmp_path / "small", resume=True, **fast)
    assert json.loads((tmp_path / "small" / "training.json").read_text())["split"] == record["split"]
    (tmp_path / "small" / "training.json").write_text(json.dumps(unfinished))
    with pytest.raises(OutputError, match="was begun with another batch_size"):
        loftq.train(str(pico), output=tmp_path / "small", resume=True, batch_size=4, **fast)
