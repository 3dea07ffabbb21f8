"""Numbers of steps, and warm-ups. Oracles: transformers' Trainer, and the rates of its schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from loftq.training.steps import shorten_warmup, steps_of


def _arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(str(folder), use_cpu=True, report_to="none", **options)


@pytest.mark.parametrize("examples", [4, 7, 8, 9, 33])
@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 2.5},
        {"per_device_train_batch_size": 4, "dataloader_drop_last": True, "num_train_epochs": 0.3},
        {"max_steps": 5},
    ],
)
def test_steps_are_those_of_transformers(examples: int, options: dict[str, Any], tmp_path: Path) -> None:
    arguments = _arguments(tmp_path, **options)
    rows = [{"x": torch.zeros(1)}] * examples
    trainer = Trainer(model=torch.nn.Linear(1, 1), args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    expected = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())[-1]
    assert steps_of(arguments, examples) == expected


@pytest.mark.parametrize(
    ("steps", "warmup", "left"), [(1, 0.03, 0), (10, 100, 9), (10, 10, 9), (10, 9, 9), (100, 0.03, 3), (1, 0, 0)]
)
def test_some_steps_have_the_full_rate(steps: int, warmup: float, left: int, tmp_path: Path) -> None:
    arguments = _arguments(tmp_path, warmup_steps=warmup, lr_scheduler_type="cosine", learning_rate=1.0)
    said = shorten_warmup(arguments, steps)
    assert (said is None) == (warmup < steps if warmup >= 1 else round(warmup * steps + 0.49) < steps)
    assert said is None or f"is shortened to {left}: the whole run has {steps} step" in said
    assert arguments.get_warmup_steps(steps) == left
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler("cosine", optimizer, arguments.get_warmup_steps(steps), steps)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert max(rates) == 1.0


def test_a_schedule_without_warm_up_is_left_alone(tmp_path: Path) -> None:
    arguments = _arguments(tmp_path, warmup_steps=100, lr_scheduler_type="constant")
    assert shorten_warmup(arguments, 1) is None
    assert arguments.warmup_steps == 100
