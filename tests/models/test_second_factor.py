"""LoRA's products that are added in place. Oracle: peft's own layers, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import loftq
from loftq.models.first_factor import keep_inputs_once
from loftq.models.second_factor import _AddsInPlace, add_in_place

TOKENS = torch.arange(64).view(2, 32) % 40 + 6


def step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train()
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def pair(folder: Path, scaling: float, dtype: torch.dtype) -> tuple[Any, Any]:
    models: list[Any] = [loftq.load_qlora(folder, dtype=dtype) for _ in range(2)]
    for model in models:
        keep_inputs_once(model)
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.scaling["default"] = scaling
    add_in_place(models[1])
    return models[0], models[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 3])
def test_outputs_and_gradients_are_those_of_peft(bits: int, dtype: torch.dtype, pico: Path, tmp_path: Path) -> None:
    folder = loftq.quantize(str(pico), output=tmp_path / "out", bits=bits, rank=4, iters=1, quiet=True).folder
    for scaling in (1.0, 0.7):
        peft, model = pair(folder, scaling, dtype)
        assert sum(isinstance(module, _AddsInPlace) for module in model.modules()) == 14
        (wanted, wanted_grads), (found, grads) = step(peft), step(model)
        assert torch.equal(wanted, found)
        assert wanted_grads.keys() == grads.keys()
        assert len(grads) == 28
        assert all(torch.equal(wanted_grads[name], grad) for name, grad in grads.items())


def test_whatever_is_not_plain_is_left_to_peft(pico: Path, tmp_path: Path) -> None:
    """Without its adapter, merged, and under autocast, the outputs are those of peft's layers."""
    folder = loftq.quantize(str(pico), output=tmp_path / "out", bits=3, rank=4, iters=1, quiet=True).folder
    peft, model = pair(folder, 0.7, torch.float32)
    found = []
    for each in (peft.eval(), model.eval()):
        with torch.no_grad():
            with each.disable_adapter():
                outputs = [each(TOKENS).logits]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs.append(each(TOKENS).logits)
            each.merge_adapter()
            outputs.append(each(TOKENS).logits)
            each.unmerge_adapter()
            outputs.append(each(TOKENS).logits)
        found.append(outputs)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], found[0][3])
