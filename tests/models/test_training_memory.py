"""What autograd keeps, counted on the meta device. Oracle: the same model run for real, by the addresses it keeps."""

from __future__ import annotations

import copy
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from picos import pico_config
from transformers import AutoModelForCausalLM

from loftq.models import cheap_activations
from loftq.models.cheap_activations import kept_tensors, recomputing_cheap_activations
from loftq.models.first_factor import keep_inputs_once
from loftq.models.head_loss import HiddenStates
from loftq.models.second_factor import add_in_place
from loftq.models.training_memory import kept_bytes, streams_logits

TOKENS = 48


def _adapted(model: Any) -> Any:
    with warnings.catch_warnings(action="ignore"):  # of GPT-2's transposed weights
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))


def _kept(model: Any, batch: tuple[int, int], context: AbstractContextManager[Any] | None = None) -> tuple[int, int]:
    """Bytes of all the storages that one forward keeps, and of the largest."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> Any:
        less = tensor if pack is None else pack(tensor)
        for part in kept_tensors(less):
            if part.untyped_storage().data_ptr() not in own:
                found.setdefault(part.untyped_storage().data_ptr(), part)
        return less

    ids, states = torch.zeros(batch, dtype=torch.int64), HiddenStates(model.get_base_model())
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model.train()
    streamed = states.of(lambda: model(**inputs)) is not None
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with context or nullcontext() as pack, hooks:
        if streamed:
            states.of(lambda: model(**inputs))
        else:
            model(**inputs, labels=ids)
    sizes = [tensor.untyped_storage().nbytes() for tensor in found.values()]
    return sum(sizes), max(sizes)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "phi3", "gemma2"])  # gemma2 has all logits at once
def test_what_is_kept_is_what_a_run_keeps(name: str) -> None:
    config = pico_config(name, vocab_size=2000, attention_dropout=0.0, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.device("meta"):
        planned = _adapted(copy.deepcopy(model).to("meta"))
    expected, largest = _kept(_adapted(model), (3, TOKENS))
    found = kept_bytes(planned, (3, TOKENS), ("causal-lm",), torch.device("cuda"), checkpointing=False)
    logits = 3 * TOKENS * 2000 * 16 if streams_logits(planned, ("causal-lm",)) else 0
    assert found - max(2 * largest, logits) == pytest.approx(expected, rel=0.08)  # kernels lay some outputs out anew


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_what_is_kept_on_a_cpu_is_less(name: str, products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cheap_activations, "_SMALL", 0)
    model = AutoModelForCausalLM.from_config(pico_config(name, attention_dropout=0.0, vocab_size=2000))
    with torch.device("meta"):
        planned = _adapted(copy.deepcopy(model).to("meta"))
    real = _adapted(model)
    keep_inputs_once(real)
    add_in_place(real)
    expected, largest = _kept(real, (3, TOKENS), recomputing_cheap_activations(products=products))
    options = {"checkpointing": False, "products": products}
    found = kept_bytes(planned, (3, TOKENS), ("causal-lm",), torch.device("cpu"), **options) / 1.5
    assert found - max(2 * largest, 3 * TOKENS * 2000 * 16) == pytest.approx(expected, rel=0.08)


def test_a_process_grows_by_more_than_lives_in_it() -> None:
    with torch.device("meta"):
        planned = _adapted(AutoModelForCausalLM.from_config(pico_config("llama")))
    found = [
        kept_bytes(planned, (1, TOKENS), ("causal-lm",), torch.device(kind), checkpointing=False)
        for kind in ("cuda", "cpu")
    ]
    assert found[1] == int(1.5 * found[0])
