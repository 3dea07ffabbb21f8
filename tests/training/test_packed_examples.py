"""Packed examples learn what they learn alone.

Covers: loftq/training/packing.py.

Oracles: the losses and gradients of each example by itself; the sums of lengths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picos import save_pico
from rows import sums, write_rows
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import loftq
from loftq.errors import OptionError
from loftq.training.collators import Collator
from loftq.training.estimate import estimate
from loftq.training.packing import check_apart, filled, pack_examples

TASKS = {"t5": "seq2seq-lm"}
EXAMPLES = [[5, 6, 7, 8, 9], [9, 8, 7], [3, 4, 5, 6], [11, 12], [2, 3, 4, 5, 6, 7]]


def examples_of(rows: list[list[int]]) -> Any:
    from datasets import Dataset

    labels = [[-100, *row[1:]] for row in rows]
    return Dataset.from_dict({"input_ids": rows, "labels": labels})


def test_rows_are_filled_with_whole_examples() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 200)
    rows = filled(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(200))
    filling = [int(lengths[row].sum()) for row in rows]
    assert max(filling) <= 64
    assert len(rows) <= -(-int(lengths.sum()) // 64) + 1
    assert filled(np.array([70, 3, 3]), 64) == [[0], [1, 2]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_losses_and_gradients_are_those_of_the_examples_alone(attention: str, pico: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32, attn_implementation=attention)
    model.config.use_cache = False  # as transformers' Trainer sets it
    packed = pack_examples(examples_of(EXAMPLES), 8)
    assert len(packed) == 3
    batch = Collator(0)([packed[i] for i in range(3)])
    assert batch.keys() == {"input_ids", "labels", "position_ids"}

    def gradients(batches: list[dict[str, torch.Tensor]]) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        total = torch.zeros(())
        for one in batches:
            labels = one.pop("labels")
            logits = model(**one).logits[:, :-1]
            flat = logits.reshape(-1, logits.shape[-1])
            total = total + torch.nn.functional.cross_entropy(flat, labels[:, 1:].reshape(-1), reduction="sum")
        total.backward()
        return total.item(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    alone, expected = gradients([Collator(0)([one]) for one in examples_of(EXAMPLES)])
    together, found = gradients([batch])
    assert together == pytest.approx(alone, rel=1e-6)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


class Forgetful(LlamaForCausalLM):
    """A model that takes positions and does not look at them."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **others: Any) -> Any:
        del position_ids
        return super().forward(input_ids, **others)


def test_a_model_that_attends_across_examples_is_refused(pico: Path) -> None:
    check_apart(LlamaForCausalLM.from_pretrained(pico))
    with pytest.raises(OptionError, match="llama attends from one example to another: leave --packing out"):
        check_apart(Forgetful.from_pretrained(pico))


def test_a_training_on_packed_rows(pico: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", sums())
    options: dict[str, Any] = {"data": str(data), "adapter": "lora", "rank": 4, "cutoff_len": 128, "cpu": True}
    plan = estimate(str(pico), output=str(tmp_path / "plan"), packing=True, **options)
    assert plan.data.examples < 38 / 2
    result = loftq.train(pico, output=tmp_path / "out", packing=True, max_steps=2, **options)
    assert result.examples == plan.data.examples
    assert np.isfinite(result.train_loss)
    assert np.isfinite(result.evaluation["loss"])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("bloom", {}, "bloom is a model that takes no positions"),
        ("t5", {}, "t5 is an encoder-decoder"),
        ("llama", {"task": "clm"}, "only the examples of --task sft are packed, not those of clm"),
    ],
)
def test_what_cannot_be_packed(kind: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = save_pico(kind, TASKS.get(kind, "causal-lm"), tmp_path / kind)
    data = write_rows(tmp_path / "rows.jsonl", sums(4))
    with pytest.raises(OptionError, match=f"--packing: {message}"):
        loftq.train(model, data=data, output=tmp_path / "out", adapter="lora", packing=True, cpu=True, **options)
    assert not (tmp_path / "out").exists()
