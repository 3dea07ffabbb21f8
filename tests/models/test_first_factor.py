"""LoRA's first factor on 16-bit inputs. Oracle: peft's own layers, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import loftq
from loftq.models.first_factor import FirstFactor, keep_inputs_once

TOKENS = torch.arange(64).view(2, 32) % 40 + 6


def step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """The loss, the gradients of the factors, and the bytes that autograd keeps in float32."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.dtype == torch.float32 and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("bits", [4, 3])
def test_outputs_and_gradients_are_those_of_peft(bits: int, pico: Path, tmp_path: Path) -> None:
    """With layers of bitsandbytes and with our own. Each linear's copy of its inputs in float32 is not kept."""
    folder = loftq.quantize(str(pico), output=tmp_path / "out", bits=bits, rank=4, iters=1, quiet=True).folder
    stock, model = (loftq.load_qlora(folder, dtype=torch.bfloat16) for _ in range(2))
    keep_inputs_once(model)
    assert sum(isinstance(module, FirstFactor) for module in model.modules()) == 14
    (wanted, wanted_grads, more), (found, grads, less) = step(stock), step(model)
    assert torch.equal(wanted, found)
    assert wanted_grads.keys() == grads.keys()
    assert len(grads) == 28
    assert all(torch.equal(wanted_grads[name], grad) for name, grad in grads.items())
    inputs = sum(module.in_features for module in model.modules() if isinstance(module, FirstFactor))
    assert more - less == 4 * TOKENS.numel() * inputs


def test_dropout_and_pools_stay_as_peft_made_them(pico: Path, tmp_path: Path) -> None:
    folder = loftq.quantize(str(pico), output=tmp_path / "out", rank=4, iters=0, dropout=0.1, quiet=True).folder
    pooled = loftq.quantize(
        str(pico), output=tmp_path / "pooled", adapter="qalora", rank=2, group_size=32, quiet=True
    ).folder
    for model in (loftq.load_qlora(folder), loftq.load_qalora(pooled)):
        keep_inputs_once(model)
        assert not any(isinstance(module, FirstFactor) for module in model.modules())


def test_autocast_decides_for_itself() -> None:
    """Oracle: nn.Linear under autocast."""
    factor = torch.nn.Linear(16, 4, bias=False)
    inputs = torch.randn(3, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = factor(inputs)
        factor.__class__ = FirstFactor
        found = factor(inputs)
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert torch.equal(found, wanted)
    assert LoraConfig().lora_dropout == 0  # without dropout, peft's layers have an identity in its place
