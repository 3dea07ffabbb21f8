"""Models that loftq loads can be copied and pickled, as other processes and `torch.save` do it.

Oracle: the logits, and the gradients of the adapter, of the model itself.

Covers: loftq/models/input_gradients.py.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import output_of, save_small

import loftq

TOKENS = torch.tensor([[11, 42, 7, 99, 3, 250, 17, 5]])


def saved(model: Any) -> Any:
    """Through `torch.save`."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch": saved,
}


def outcome(model: Any) -> list[torch.Tensor]:
    """The logits, then the gradients of a loss, with activations computed again in the backward pass."""
    model.train().gradient_checkpointing_enable()
    result = model(input_ids=TOKENS, labels=TOKENS)
    result.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    return [result.logits.detach(), *gradients]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 2},
        pytest.param({"bits": 8}, marks=pytest.mark.slow),
        pytest.param({"quant_type": "int", "format": "gptq"}, marks=pytest.mark.slow),
        pytest.param({"bits": 2, "quant_type": "tcq"}, marks=pytest.mark.slow),
        pytest.param({"adapter": "qalora", "group_size": 32}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_copies_are_the_model(options: dict[str, Any], pico: Path, tmp_path: Path) -> None:
    folder = loftq.quantize(str(pico), output=tmp_path / "out", rank=2, iters=1, **options).folder
    load = loftq.load_qalora if "adapter" in options else loftq.load_qlora
    copies = {name: way(load(folder)) for name, way in WAYS.items()}
    expected = outcome(load(folder))
    for name, other in copies.items():
        for found, wanted in zip(outcome(other), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, msg=f"{name}: differs")


def test_embeddings_that_return_more_than_one_tensor_train(tmp_path: Path) -> None:
    """BEiT's also return the size of the image."""
    source = save_small("beit", "image-classification", tmp_path / "source")
    folder = loftq.quantize(str(source), output=tmp_path / "out", rank=8, iters=1, quiet=True).folder
    model = loftq.load_qlora(folder).train()
    model.gradient_checkpointing_enable()
    output_of(model, model.base_model.model).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if ".lora_" in name)
