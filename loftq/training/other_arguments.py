"""Checks arguments of transformers' TrainingArguments: those that `--set` gives, and names of its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from loftq.errors import OptionError, UnknownNameError
from loftq.secrets import find_secret

# Arguments that have an option of their own.
OWN = {
    "output_dir": "--output",
    "num_train_epochs": "--epochs",
    "max_steps": "--max-steps",
    "learning_rate": "--learning-rate",
    "lr_scheduler_type": "--lr-scheduler",
    "warmup_steps": "--warmup-steps",
    "weight_decay": "--weight-decay",
    "per_device_train_batch_size": "--batch-size",
    "per_device_eval_batch_size": "--eval-batch-size",
    "gradient_accumulation_steps": "--gradient-accumulation",
    "seed": "--seed",
    "eval_steps": "--eval-steps",
    "save_steps": "--save-steps",
    "report_to": "--report-to",
    "gradient_checkpointing": "--gradient-checkpointing",
    "activation_checkpointing": "--gradient-checkpointing",
    "optim": "--optim",
    "bf16": "--dtype",
    "fp16": "--dtype",
    "use_cpu": "--cpu",
    "push_to_hub": "--push-to-hub",
    "hub_model_id": "--push-to-hub",
    "resume_from_checkpoint": "--resume",
}
SCHEDULER = "cosine"  # the default, which is not looked up: transformers takes seconds to import
_FIXED = {"remove_unused_columns": "the examples have no unused columns"}


def check_set(values: Mapping[str, Any]) -> None:
    """Raise OptionError for the arguments that `--set` cannot give.

    These are arguments that hold a secret, because they would be written into records and checkpoints; arguments that
    have an option of their own; and arguments that transformers does not have.
    """
    secret = find_secret(values)
    if secret is not None:
        raise OptionError(
            f"--set {secret}: holds a secret, which would be written into checkpoints: leave it out, and log in with "
            "`hf auth login` or set HF_TOKEN; other services read their own environment variable"
        )
    if not values:
        return
    from transformers import TrainingArguments

    argument_names = {entry.name for entry in fields(TrainingArguments)}
    for name in values:
        if name in _FIXED:
            raise OptionError(f"--set {name}: cannot be changed, because {_FIXED[name]}: leave it out")
        if name in OWN:
            raise OptionError(f"--set {name}: use the option {OWN[name]} instead")
        if name not in argument_names:
            raise UnknownNameError("TrainingArguments name", name, argument_names)


def check_choices(lr_scheduler: str, optim: str | None) -> None:
    """Raise UnknownNameError for a schedule or an optimizer that transformers does not have."""
    if lr_scheduler != SCHEDULER:
        from transformers import SchedulerType

        if lr_scheduler not in {*SchedulerType}:
            raise UnknownNameError("lr scheduler", lr_scheduler, [kind.value for kind in SchedulerType])
    if optim is not None:
        from transformers.training_args import OptimizerNames

        if optim not in {*OptimizerNames}:
            raise UnknownNameError("optim", optim, [kind.value for kind in OptimizerNames])
