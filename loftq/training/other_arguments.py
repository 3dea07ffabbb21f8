"""Checks arguments of transformers' TrainingArguments: those that `--set` gives, and names of its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from loftq.errors import OptionError, UnknownNameError
from loftq.planning.synonyms import SYNONYMS
from loftq.secrets import find_secret
from loftq.settings import option_name

_SAME = (  # arguments of TrainingArguments that are options under the same name
    "max_steps",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "seed",
    "eval_steps",
    "save_steps",
    "report_to",
    "gradient_checkpointing",
    "optim",
    "push_to_hub",
)
# Names of other programs, and of transformers, that have an option of their own.
OWN = {name: option_name(row.setting) for name, row in SYNONYMS.items() if row.setting not in (None, "set")}
OWN |= {name: option_name(name) for name in _SAME}
SCHEDULER = "cosine"  # the default, which is not looked up: transformers takes seconds to import
_LAUNCHED = "`accelerate launch` sets it, by the file of `loftq config MODEL_DIR --for accelerate-fsdp`"
_FIXED = {
    "remove_unused_columns": "the examples have no unused columns",
    "fsdp": _LAUNCHED,
    "fsdp_config": _LAUNCHED,
    "deepspeed": "`loftq train` does not support DeepSpeed",
}


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
