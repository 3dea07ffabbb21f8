"""The distillation's parts: how fast it learns, and what it learns from."""

from __future__ import annotations

import pytest
import torch
from picos import inputs_for, pico_model

from loftq.solving.refine import _prepare, _rate


def test_a_step_is_a_part_of_the_way() -> None:
    """The rate of refining, by hand: at most 2e-4, as the root of the divergence, against the rank, over √s."""
    far, near = (_rate(64, 1.0, before) for before in (1.0, 0.04))
    assert (far, near) == (pytest.approx(2e-4), pytest.approx(0.018 * 0.2 / 64))
    assert _rate(16, 4.0, 0.04) == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("gpt2", "causal-lm"),
        ("opt", "causal-lm"),
        ("bart", "seq2seq-lm"),
        ("t5", "seq2seq-lm"),
        ("bert", "masked-lm"),
        ("deberta-v2", "masked-lm"),
        ("distilbert", "masked-lm"),
    ],
)
@torch.no_grad()
def test_nothing_is_dropped(name: str, task: str) -> None:
    """Oracle: the model's own answers where it does not train."""
    model = pico_model(name, task).float()
    inputs = inputs_for(model)
    expected = model(**inputs).logits
    assert not torch.equal(model.train()(**inputs).logits, expected)
    _prepare(model)
    assert torch.equal(model.train()(**inputs).logits, expected)
