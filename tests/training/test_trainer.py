"""The trainer that streams its logits. Oracle: transformers' Trainer on the same model, data and seed."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from picos import pico_model
from transformers import Trainer, TrainingArguments

from loftq.models import cheap_activations, head_loss
from loftq.models.head_loss import IGNORED
from loftq.training.collators import Collator
from loftq.training.trainer import LeanTrainer

ROWS = [
    {
        "input_ids": list(range(10, 10 + length)),
        "labels": [IGNORED] * (length // 2) + list(range(20, 20 + -(-length // 2))),
    }
    for length in (9, 14, 6, 11, 8, 13, 7, 10)
]


def trained(kind: type[Trainer], name: str, folder: Path, **options: Any) -> tuple[list[float], float]:
    """The losses of each step, and the loss of the evaluation at the end."""
    targets = ["c_attn"] if name == "gpt2" else ["q_proj", "v_proj"]
    with warnings.catch_warnings(action="ignore"):  # GPT-2's weights are transposed
        model: Any = get_peft_model(pico_model(name, "causal-lm").float(), LoraConfig(r=4, target_modules=targets))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(key)))
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True, **options}
    arguments = TrainingArguments(
        str(folder), logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, **settings
    )
    rows: Any = ROWS
    trainer = kind(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, data_collator=Collator(0))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"gradient_accumulation_steps": 2}),
        pytest.param("llama", {"label_smoothing_factor": 0.1}, marks=pytest.mark.slow),
        pytest.param("llama", {"bf16": True}, marks=pytest.mark.slow),
        pytest.param("gemma2", {}, marks=pytest.mark.slow),  # caps its logits
        pytest.param("gpt2", {"activation_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", {}, marks=pytest.mark.slow),
    ],
)
def test_losses_are_those_of_transformers(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_loss, "LOGITS", 1500)
    wanted = trained(Trainer, name, tmp_path, **options)
    calls: list[Any] = []
    original = head_loss.chunked
    monkeypatch.setattr(head_loss, "chunked", lambda *arguments: calls.append(arguments) or original(*arguments))
    found = trained(LeanTrainer, name, tmp_path, **options)
    assert bool(calls) == (name != "gemma2")
    tolerance = 2e-2 if "bf16" in options else 1e-4
    assert found[0] == pytest.approx(wanted[0], rel=tolerance)
    assert found[1] == pytest.approx(wanted[1], rel=tolerance)


def test_activations_that_are_computed_again_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same training with all activations kept."""
    monkeypatch.setattr(cheap_activations, "_SMALL", 0)
    calls: list[torch.device] = []
    original = cheap_activations.keeping_less
    monkeypatch.setattr("loftq.training.trainer.keeping_less", lambda device: calls.append(device) or original(device))
    found = trained(LeanTrainer, "llama", tmp_path, gradient_accumulation_steps=2)
    assert len(calls) == 6  # one for each batch that is learned from, and none for the evaluation
    monkeypatch.setattr("loftq.training.trainer.keeping_less", lambda _: nullcontext())
    assert found == trained(LeanTrainer, "llama", tmp_path, gradient_accumulation_steps=2)


def test_batches_of_like_lengths_are_padded_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same rows in random order. transformers sorts a few batches at a time, here eight."""
    padded: list[int] = []
    original = Collator.__call__

    def collated(self: Collator, examples: Any) -> Any:
        batch = original(self, examples)
        padded.append(int((batch["attention_mask"] == 0).sum()))
        return batch

    monkeypatch.setattr(Collator, "__call__", collated)
    monkeypatch.setitem(globals(), "ROWS", ROWS * 8)
    found = {}
    for strategy in ("random", "group_by_length"):
        padded.clear()
        trained(LeanTrainer, "llama", tmp_path, train_sampling_strategy=strategy, max_steps=32)
        found[strategy] = sum(padded[:32])
    assert found["group_by_length"] < 0.5 * found["random"]
