"""Activations that are computed again. Oracle: the same model as autograd keeps it, to the last bit.

Covers: loftq/models/cheap_activations.py, loftq/models/recorded_tensors.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from picos import pico_config
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from loftq.models import cheap_activations
from loftq.models.cheap_activations import keeping_less, kept_tensors, recomputing_cheap_activations
from loftq.models.first_factor import keep_inputs_once
from loftq.models.second_factor import add_in_place

IDS = torch.arange(64).view(2, 32) % 40 + 6
CLASSES = {"t5": AutoModelForSeq2SeqLM, "bert": AutoModelForSequenceClassification}


@pytest.fixture(autouse=True)
def no_tensor_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cheap_activations, "_SMALL", 0)


def adapted(name: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = pico_config(name)
    for key, value in list(config.to_dict().items()):
        if ("drop" in key or "pdrop" in key) and isinstance(value, float):
            setattr(config, key, 0.0)
    model = CLASSES.get(name, AutoModelForCausalLM).from_config(config).to(dtype)
    with warnings.catch_warnings(action="ignore"):  # about GPT-2's transposed weights
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    keep_inputs_once(model)
    return model.train()


def step(
    model: Any, context: AbstractContextManager[Any], rounds: int = 1
) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """The loss, the gradients, and the bytes that autograd keeps."""
    kept: dict[int, torch.Tensor] = {}
    model.zero_grad()
    for _ in range(rounds):
        with context as pack:

            def keep(tensor: torch.Tensor, pack: Any = pack) -> Any:
                less = tensor if pack is None else pack(tensor)
                kept.update({part.untyped_storage()._cdata: part for part in kept_tensors(less)})
                return less

            with torch.autograd.graph.saved_tensors_hooks(keep, cheap_activations._unpack):
                labels = IDS[:, 0] % 2 if model.config.model_type == "bert" else IDS
                loss = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=labels).loss
        loss.backward()
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, size


def assert_same(
    model: Any,
    less_than: float,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    *,
    products: bool = False,
) -> None:
    with context():
        loss, grads, more = step(model, nullcontext())
        grads = {name: grad.clone() for name, grad in grads.items()}
        found, found_grads, less = step(model, recomputing_cheap_activations(products=products))
    assert torch.equal(loss, found)
    assert grads.keys() == found_grads.keys()
    assert grads
    assert all(torch.equal(grads[name], grad) for name, grad in found_grads.items())
    assert less < less_than * more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "phi3", "gemma2", "bert", "t5"])
def test_gradients_are_the_same_and_less_is_kept(name: str, dtype: torch.dtype) -> None:
    assert_same(adapted(name, dtype), 0.95)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "phi3", "bert", "t5"])
def test_products_are_computed_again_if_asked(name: str) -> None:
    model = adapted(name, torch.float32)
    _, _, cheap = step(model, recomputing_cheap_activations())
    add_in_place(model)
    assert_same(model, 0.9, products=True)
    _, _, less = step(model, recomputing_cheap_activations(products=True))
    assert less < 0.97 * cheap


def test_under_autocast() -> None:
    assert_same(adapted("llama", torch.float32), 0.95, lambda: torch.autocast("cpu", dtype=torch.bfloat16))


def test_over_several_batches() -> None:
    model = adapted("llama", torch.float32)
    wanted = {name: grad.clone() for name, grad in step(model, nullcontext(), rounds=2)[1].items()}
    with recomputing_cheap_activations():
        found = step(model, nullcontext(), rounds=2)[1]
    assert all(torch.equal(wanted[name], grad) for name, grad in found.items())


def test_beside_gradient_checkpointing() -> None:
    model = adapted("llama", torch.float32)
    model.enable_input_require_grads()
    wanted = {name: grad.clone() for name, grad in step(model, nullcontext())[1].items()}
    model.gradient_checkpointing_enable()
    with recomputing_cheap_activations():
        found = step(model, nullcontext())[1]
    assert all(torch.equal(wanted[name], grad) for name, grad in found.items())


class Changing(nn.Module):
    """Changes the hidden states, from which a norm was computed, in place: autograd does not need them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        gate = hidden.to(torch.float64) * 2
        out = self.last((gate * gate.sigmoid()).to(torch.float32))
        hidden += 1
        hidden[0] = 0.0
        return (out + hidden).square().sum()


def test_what_came_from_a_tensor_is_computed_before_it_changes() -> None:
    model, x = Changing(), torch.randn(16, 8)
    model(x).backward()
    wanted = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    with recomputing_cheap_activations():
        loss = model(x)
    loss.backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(wanted, model.parameters(), strict=True))


def test_what_is_computed_within_vmap_is_let_be() -> None:
    """As transformers makes the masks of Gemma 3. Oracle: the gradient without."""

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(16)
        mask = torch.vmap(lambda row: (rows <= row) & (rows % 2 == 0).logical_not())(rows)
        return (x.sigmoid() * mask).square().sum()

    x, y = (torch.ones(16, 16, requires_grad=True) for _ in range(2))
    loss_of(x).backward()
    with recomputing_cheap_activations():
        loss = loss_of(y)
    loss.backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.equal(x.grad, y.grad)


def test_a_change_behind_torch_is_an_error() -> None:
    x = torch.randn(16, 8, requires_grad=True)
    hidden = x + x
    with recomputing_cheap_activations():
        loss = hidden.to(torch.float64).square().square().sum()
    hidden.detach().add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_a_graph_can_be_used_twice() -> None:
    x = torch.randn(16, 8, requires_grad=True)
    with recomputing_cheap_activations():
        gate = (x + 0.0).to(torch.float64)
        loss = (gate * gate.sigmoid() * gate).sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


def test_nothing_is_held_after_the_backward_pass() -> None:
    x = torch.randn(16, 8, requires_grad=True)
    with recomputing_cheap_activations():
        hidden = x + x
        loss = nn.functional.silu(hidden.to(torch.float64)).square().sum()
    address = hidden.untyped_storage()
    reference = torch.multiprocessing.reductions.StorageWeakRef(address)
    del hidden, address
    assert not reference.expired()
    loss.backward()
    assert reference.expired()


def test_only_on_a_cpu() -> None:
    assert all(isinstance(keeping_less(torch.device(kind)), nullcontext) for kind in ("cuda", "mps"))
    assert not isinstance(keeping_less(torch.device("cpu")), nullcontext)
