"""What a training was asked to do: every setting, with its default and its bounds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq.errors import OptionError, UnknownNameError
from loftq.models.devices import COMPUTE_DTYPES
from loftq.training.recipe_files import ALIASES
from loftq.training.tasks import TRAINING_TASKS


@dataclass(frozen=True)
class Mode:
    """A way to train an adapter, and the learning rate that is known to work for it."""

    text: str
    learning_rate: float
    reason: str


MODES = {
    "lora": Mode("on a full-precision model", 2e-4, "as in the LoRA and QLoRA papers"),
    "qlora": Mode("on a quantized backbone", 2e-4, "QLoRA's for 7B to 13B; LoftQ's papers took 1e-4 to 4e-4"),
    "qalora": Mode(
        "on pooled inputs, to merge exactly",
        1e-3,
        "as in the figures of the README: a pooled factor has fewer parameters",
    ),
}

# What a model that is not quantized yet is quantized by first: `loftq quantize` has more.
QUANTIZING = ("bits", "rank", "alpha", "dropout", "target_modules", "method", "calibration", "group_size", "num_labels")
_PROMPTED = ("sft", "gsm8k")  # tasks whose prompts a chat template may write
# What may be another when a run is resumed: the result does not depend on it.
_FREE = ("report_to", "save_steps", "output", "push_to_hub")


@dataclass(frozen=True)
class Settings:
    """The settings of `loftq train`. Raises OptionError for a value that none can have."""

    model: str
    data: tuple[str, ...]
    output: str
    task: str = "sft"
    eval_data: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    chat_template: bool | None = None
    adapter: str | None = None
    bits: float | None = None
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    target_modules: tuple[str, ...] | None = None
    method: str | None = None
    calibration: str | None = None
    group_size: int | None = None
    num_labels: int | None = None
    epochs: float = 3.0
    max_steps: int | None = None
    learning_rate: float | None = None
    lr_scheduler: str = "cosine"
    warmup_steps: int | None = None
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    batch_size: int = 8
    eval_batch_size: int = 8
    gradient_accumulation: int = 1
    max_source_length: int | None = None
    max_target_length: int | None = None
    cutoff_len: int = 1024
    seed: int = 0
    eval_steps: int | None = None
    save_steps: int | None = None
    report_to: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    optim: str | None = None
    dtype: str | None = None
    cpu: bool = False
    push_to_hub: str | None = None
    set: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task not in TRAINING_TASKS:
            raise UnknownNameError("task", self.task, TRAINING_TASKS)
        if self.adapter is not None and self.adapter not in MODES:
            raise UnknownNameError("adapter", self.adapter, MODES)
        if self.dtype is not None and self.dtype not in COMPUTE_DTYPES:
            raise UnknownNameError("dtype", self.dtype, COMPUTE_DTYPES)
        for name in self.columns:
            if name not in TRAINING_TASKS[self.task].roles:
                raise UnknownNameError("column", name, TRAINING_TASKS[self.task].roles)
        if self.chat_template and self.task not in _PROMPTED:
            raise OptionError(f"--chat-template: goes with --task {' or '.join(_PROMPTED)}: {self.task} has no prompts")
        self._check_numbers()
        self._check_arguments()

    def _check_numbers(self) -> None:
        at_least_one = (
            "max_steps",
            "batch_size",
            "eval_batch_size",
            "gradient_accumulation",
            "eval_steps",
            "save_steps",
        )
        for name in (*at_least_one, "max_source_length", "max_target_length", "rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{option(name)} {value}: expected 1 or more")
        if self.cutoff_len < 8:
            raise OptionError(f"--cutoff-len {self.cutoff_len}: expected 8 tokens or more")
        if not 0 < self.epochs <= 1e6:
            raise OptionError(f"--epochs {self.epochs}: expected a number above 0, at most a million")
        if self.learning_rate is not None and not 0 < self.learning_rate < 10:
            raise OptionError(
                f"--learning-rate {self.learning_rate}: expected a number above 0 and below 10, such as 2e-4"
            )
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise OptionError(f"--warmup-steps {self.warmup_steps}: expected 0 or more")
        if not 0 <= self.warmup_ratio < 1:
            raise OptionError(f"--warmup-ratio {self.warmup_ratio}: expected 0 or more, below 1")
        if self.weight_decay < 0:
            raise OptionError(f"--weight-decay {self.weight_decay}: expected 0 or more")
        if not 0 <= self.seed < 2**32:
            raise OptionError(f"--seed {self.seed}: expected 0 to 2**32 - 1")

    def _check_arguments(self) -> None:
        from transformers import SchedulerType, TrainingArguments
        from transformers.training_args import OptimizerNames

        known = {entry.name for entry in dataclasses.fields(TrainingArguments)}
        for name in self.set:
            if name in _FIXED:
                raise OptionError(f"--set {name}: is fixed: {_FIXED[name]}")
            if name in _OWN:
                raise OptionError(f"--set {name}: has an option of its own, {_OWN[name]}")
            if name not in known:
                raise UnknownNameError("TrainingArguments name", name, known)
        if self.lr_scheduler not in set(SchedulerType):
            raise UnknownNameError("lr scheduler", self.lr_scheduler, [kind.value for kind in SchedulerType])
        if self.optim is not None and self.optim not in set(OptimizerNames):
            raise UnknownNameError("optim", self.optim, [kind.value for kind in OptimizerNames])

    @property
    def quantizing(self) -> dict[str, Any]:
        """What was said of how to quantize, or to adapt, a model that is no artifact."""
        return {name: value for name in QUANTIZING if (value := getattr(self, name)) is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a recipe file holds them: what was left unsaid is left out."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return dict(
            json.loads(json.dumps({name: value for name, value in values.items() if value not in (None, (), {})}))
        )

    def differences(self, earlier: Mapping[str, Any]) -> list[str]:
        """Names of settings that differ from those of an earlier run, where the result depends on them."""
        mine = self.to_dict()
        return sorted(name for name in {*mine, *earlier} if name not in _FREE and mine.get(name) != earlier.get(name))


_OWN = {
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
_FIXED = {"remove_unused_columns": "what is trained on has no column that is not used"}
# What a setting is called elsewhere: refused from Python and the command line, with the name that it has here.
_OTHERWISE = {"lr": "learning_rate", **{name: own[2:].replace("-", "_") for name, own in _OWN.items()}, **ALIASES}


def option(name: str) -> str:
    """A setting's name on the command line."""
    return "--" + name.replace("_", "-")


def settings_of(values: Mapping[str, Any]) -> Settings:
    """Settings from names and plain values. Raises OptionError for an unknown name, or one that is missing."""
    known = {entry.name for entry in dataclasses.fields(Settings)}
    for name in values:
        if name in known:
            continue
        if (own := _OTHERWISE.get(name)) in known:
            raise OptionError(f"unknown setting {name!r}; did you mean {own}?")
        raise UnknownNameError("setting", name, known | set(ALIASES))
    for name in ("model", "data", "output"):
        if not values.get(name):
            raise OptionError(f"no {name} is given: {_MISSING[name]}")
    given = dict(values)
    for name in ("data", "eval_data", "report_to", "target_modules"):
        if isinstance(given.get(name), (str, Path)):
            given[name] = (str(given[name]),)
        elif isinstance(given.get(name), (list, tuple)):
            given[name] = tuple(map(str, given[name]))
    given |= {"model": str(given["model"]), "output": str(Path(str(given["output"])).expanduser())}
    _check_types(given)
    return Settings(**given)


_MISSING = {
    "model": "name a folder that `loftq quantize` wrote, or a model",
    "data": "name files or a data set with --data",
    "output": "name the folder to write with --output",
}


def _check_types(values: dict[str, Any]) -> None:
    """Numbers, flags and tables where they are expected: a file may hold anything."""
    for entry in dataclasses.fields(Settings):
        value, kind = values.get(entry.name), str(entry.type)
        if value is None:
            continue
        if kind.startswith("int") and isinstance(value, float) and value.is_integer():
            value = values[entry.name] = int(value)
        fits = (
            (kind.startswith("int") and isinstance(value, int) and not isinstance(value, bool))
            or (kind.startswith("float") and isinstance(value, (int, float)) and not isinstance(value, bool))
            or (kind.startswith("bool") and isinstance(value, bool))
            or (kind.startswith("str") and isinstance(value, str))
            or (kind.startswith("tuple") and isinstance(value, tuple))
            or (kind.startswith("Mapping") and isinstance(value, Mapping))
        )
        if not fits:
            raise OptionError(f"{entry.name} = {value!r}: expected {_EXPECTED[kind.split('[')[0].split(' ')[0]]}")


_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "tuple": "a text or a list of texts",
    "Mapping": "a table of names and values",
}
