"""The distillation's parts: how fast it learns, and what it learns from."""

from __future__ import annotations

import pytest
import torch
from picos import inputs_for, pico_model

from loftq.solving.refine import _checkpoint, _prepare, _rate, checkpointed_part


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


def test_small_models_checkpoint_their_first_blocks_on_a_cpu() -> None:
    model = pico_model("llama", "causal-lm")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    small, large = 1_000_000, 1_000_000_000
    parts = [checkpointed_part(model, weights, device) for weights in (small, large) for device in (cpu, gpu)]
    assert parts == [0.75, 0.0, 1.0, 1.0]
    model.supports_gradient_checkpointing = False
    assert checkpointed_part(model, large, cpu) == 0.0
    _checkpoint(model, 0.5)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False]
