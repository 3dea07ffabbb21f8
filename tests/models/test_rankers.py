"""Reward models and rerankers, which score a text with one number, and embedding models on decoders.

Oracles: the scores and embeddings of the full-precision model; the loss of Bradley and Terry, written out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from grids import thinned
from peft import PeftModel
from small_models import dtype_of, inputs_of, save_small
from transformers import AutoModel, AutoModelForSequenceClassification

import loftq
from loftq.models.loading import guard_cpu

OPTIONS: dict[str, Any] = {"rank": 16, "iters": 2, "quiet": True}
RANKERS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "xlm-roberta", "modernbert", "deberta-v2")
EMBEDDERS = ("qwen3", "mistral", "gemma3_text", "xlm-roberta", "modernbert")


def load_stock(auto: Any, folder: Path, dtype: torch.dtype) -> tuple[Any, PeftModel]:
    base = auto.from_pretrained(folder, dtype=dtype)
    guard_cpu(base)
    return base, PeftModel.from_pretrained(base, folder, subfolder="loftq_init", is_trainable=True).eval()


@pytest.mark.parametrize("kind", thinned(((kind,) for kind in RANKERS), lambda kind: kind in ("qwen3", "xlm-roberta")))
def test_a_model_of_one_score_is_quantized_and_learns_from_pairs(kind: str, tmp_path: Path) -> None:
    source = save_small(kind, "sequence-classification", tmp_path / "source", num_labels=1)
    report = loftq.quantize(str(source), output=tmp_path / "out", **OPTIONS)
    assert report.task == "sequence-classification"
    dtype = dtype_of(kind)
    full = AutoModelForSequenceClassification.from_pretrained(source, dtype=dtype).eval()
    base, model = load_stock(AutoModelForSequenceClassification, report.folder, dtype)
    inputs = inputs_of(full, rows=64)
    with torch.no_grad():
        wanted, scores = full(**inputs).logits.float(), model(**inputs).logits.float()
        with model.disable_adapter():
            for module in base.modules():  # the head is the adapter's: off, it would be one begun anew
                if hasattr(module, "modules_to_save"):
                    module.original_module.load_state_dict(module.modules_to_save["default"].state_dict())
            alone = model(**inputs).logits.float()
    assert scores.shape == (len(inputs["input_ids"]), 1)
    assert (scores - wanted).norm() < (alone - wanted).norm()

    def loss() -> torch.Tensor:
        chosen, rejected = model(**inputs).logits.float().view(-1, 2).unbind(1)
        return -torch.nn.functional.logsigmoid(chosen - rejected).mean()

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = loss()
    before.backward()
    factors = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    assert len(factors) == 2 * len(report.layers)
    assert all(factor.grad is not None and factor.grad.any() for factor in factors)
    optimizer.step()
    assert loss() < before


@pytest.mark.parametrize("kind", thinned(((kind,) for kind in EMBEDDERS), lambda kind: kind == "qwen3"))
def test_embeddings_of_the_last_token_come_nearer(kind: str, tmp_path: Path) -> None:
    source = save_small(kind, "feature-extraction", tmp_path / "source")
    report = loftq.quantize(str(source), output=tmp_path / "out", **OPTIONS)
    assert report.task == "feature-extraction"
    full = AutoModel.from_pretrained(source, dtype=dtype_of(kind)).eval()
    _, model = load_stock(AutoModel, report.folder, dtype_of(kind))
    inputs = inputs_of(full)

    def embeddings(of: Any) -> torch.Tensor:
        return torch.nn.functional.normalize(of(**inputs).last_hidden_state[:, -1].float(), dim=-1)

    with torch.no_grad():
        wanted, adapted = embeddings(full), embeddings(model)
        with model.disable_adapter():
            alone = embeddings(model)
    assert (adapted * wanted).sum(1).mean() > (alone * wanted).sum(1).mean()
    embeddings(model.train()).square().mul(torch.arange(64.0)).sum().backward()
    factors = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    assert all(factor.grad is not None and factor.grad.any() for factor in factors)
