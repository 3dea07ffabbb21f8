"""Converts the settings of a training into transformers' TrainingArguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from transformers import TrainingArguments

from loftq.display import one_line
from loftq.errors import OptionError
from loftq.models.devices import compute_dtype, device_to_run
from loftq.training.settings import BATCH, MODES, TrainSettings
from loftq.training.tasks import TRAINING_TASKS

_EVALUATION_INTERVAL = 0.1  # part of the run between two evaluations, and between two checkpoints
_CHECKPOINTS = 2  # number of checkpoints that are kept


def arguments_of(settings: TrainSettings, mode: str) -> TrainingArguments:
    """Return TrainingArguments with these settings.

    Raises OptionError for a setting that transformers refuses or that the device does not support.
    """
    device = device_to_run(settings.cpu)
    dtype = compute_dtype(settings.dtype, device)
    cuda = device.type == "cuda"
    values: dict[str, Any] = {
        "output_dir": settings.output,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "learning_rate": settings.learning_rate or MODES[mode].learning_rate,
        "lr_scheduler_type": settings.lr_scheduler,
        "warmup_steps": settings.warmup_ratio if settings.warmup_steps is None else settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "per_device_train_batch_size": settings.batch_size or BATCH,
        "per_device_eval_batch_size": settings.eval_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation or 1,
        "seed": settings.seed,
        "optim": settings.optim or default_optimizer(device),
        "bf16": cuda and dtype == torch.bfloat16,
        "fp16": cuda and dtype == torch.float16,
        "use_cpu": device.type == "cpu",
        "eval_strategy": "steps",
        "eval_steps": settings.eval_steps or _EVALUATION_INTERVAL,
        "prediction_loss_only": TRAINING_TASKS[settings.task].scores
        is None,  # the logits of all tokens would fill the memory
        "save_strategy": "steps",
        "save_steps": settings.save_steps or _EVALUATION_INTERVAL,
        "save_total_limit": _CHECKPOINTS,
        "logging_steps": 0.02,
        "logging_first_step": True,
        "report_to": list(settings.report_to) or "none",
        "label_names": ["labels"],
        "remove_unused_columns": False,
        "dataloader_pin_memory": cuda,
        "ddp_find_unused_parameters": False,
        **(_checkpointing() if settings.gradient_checkpointing else {}),
        **settings.set,
    }
    _check_set(settings.set)
    with explain_settings():
        return TrainingArguments(**values)


def default_optimizer(device: torch.device) -> str:
    """The optimizer that is used by default, by its name in transformers."""
    return "paged_adamw_8bit" if device.type == "cuda" else "adamw_torch"


@contextmanager
def explain_settings() -> Iterator[None]:
    """Turn the errors that transformers raises for invalid settings into an OptionError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError, AssertionError) as error:
        raise OptionError(f"transformers refuses these settings: {one_line(error)}") from error


def _check_set(values: Mapping[str, Any]) -> None:
    """Raise OptionError for a value whose type is not that of its default: transformers would fail only later."""
    defaults = {entry.name: entry.default for entry in fields(TrainingArguments)}
    for name, value in values.items():
        kind = type(defaults[name])
        number = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        if (kind in (int, float) and not number) or (kind is bool and not isinstance(value, bool)):
            expected = "true or false" if kind is bool else "a number"
            raise OptionError(f"--set {name}={value}: expected {expected}")
    if values.get("save_only_model"):
        raise OptionError("--set save_only_model=true: a training cannot continue from such checkpoints: leave it out")


def _checkpointing() -> dict[str, Any]:
    """The arguments for gradient checkpointing, under the name that the installed transformers uses."""
    argument_names = {entry.name for entry in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in argument_names else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
