"""Losses without the logits of a whole batch. Oracle: the model's own loss, and its gradients by autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from picos import inputs_for, pico_model
from torch import nn

from loftq.models import head_loss
from loftq.models.head_loss import IGNORED, HiddenStates, chunked, next_token_loss

SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "LOGITS", 2000)  # a few rows of the pico vocabularies


def frozen_head(name: str, task: str) -> tuple[Any, dict[str, torch.Tensor]]:
    model: Any = pico_model(name, task).float()
    for parameter in model.get_output_embeddings().parameters():
        parameter.requires_grad_(False)
    return model, inputs_for(model)


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=SLOW), pytest.param("opt", marks=SLOW)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_are_the_model_s_own(name: str, smoothing: float) -> None:
    model, inputs = frozen_head(name, "causal-lm")
    labels = inputs["input_ids"].clone()
    labels[:, : labels.shape[1] // 2] = IGNORED
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    expected = nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    wanted = gradients(model, 3 * expected)
    states = HiddenStates(model)
    output = states.of(lambda: model(**inputs))
    assert output is not None
    assert states.head is not None
    loss, count = next_token_loss(output.logits, states.head, labels, smoothing=smoothing)
    assert count == int((targets != IGNORED).sum())
    torch.testing.assert_close(loss, expected)
    found = gradients(model, 3 * loss)
    assert set(found) == set(wanted)
    for key, gradient in wanted.items():
        assert (found[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-5, key
    with torch.no_grad():
        torch.testing.assert_close(
            next_token_loss(output.logits, states.head, labels, smoothing=smoothing)[0], expected
        )
    assert torch.equal(model(**inputs).logits[:, :-1].flatten(0, 1), logits)  # the head is itself again


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("gemma2", "causal-lm"),
        pytest.param("bart", "seq2seq-lm", marks=SLOW),
        pytest.param("bert", "sequence-classification", marks=SLOW),
    ],
)
def test_models_that_do_more_with_their_logits_take_the_usual_way(name: str, task: str) -> None:
    """gemma2 caps its logits, bart adds a bias to them, and a classifier has no head for tokens."""
    model: Any = pico_model(name, task).float()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    inputs, states = inputs_for(model), HiddenStates(model)
    expected = model(**inputs).logits
    for _ in range(2):
        assert states.of(lambda: model(**inputs)) is None
    assert torch.equal(model(**inputs).logits, expected)


def test_a_head_that_trains_takes_the_usual_way() -> None:
    model: Any = pico_model("llama", "causal-lm")
    assert HiddenStates(model).head is None
    assert HiddenStates(model).of(lambda: pytest.fail("it was run")) is None


def test_a_fault_of_the_model_is_not_hidden() -> None:
    model, _ = frozen_head("llama", "causal-lm")

    def fail() -> Any:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        HiddenStates(model).of(fail)


def test_no_row_gives_no_loss() -> None:
    hidden = torch.randn(0, 4, requires_grad=True)
    total = chunked(hidden, nn.Linear(4, 8), lambda logits, _: logits.sum())
    total.backward()
    assert total.item() == 0
    assert hidden.grad is not None
