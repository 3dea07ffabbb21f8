"""The settings of `loftq train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.errors import OptionError, UnknownNameError
from loftq.models.choices import COMPUTE_DTYPES, OFFLOADS
from loftq.planning.settings import QuantizeSettings
from loftq.planning.synonyms import SYNONYMS
from loftq.settings import again, check, check_names, from_dict, plain, setting, to_dict
from loftq.training.other_arguments import SCHEDULER, check_choices, check_set
from loftq.training.tasks import TRAINING_TASKS


@dataclass(frozen=True)
class Mode:
    """A way to train an adapter, and its default learning rate with the reason for it."""

    text: str
    learning_rate: float
    reason: str


MODES = {
    "lora": Mode("on a full-precision model", 2e-4, "as in the LoRA and QLoRA papers"),
    "qlora": Mode("on a quantized backbone", 2e-4, "as in QLoRA for 7B to 13B; LoftQ's paper uses 1e-4 to 4e-4"),
    "qalora": Mode("on pooled inputs, merges without loss", 1e-3, "measured: its factors have fewer parameters"),
}

# Settings for a model that must be quantized before it is trained; `loftq quantize` has more of them.
QUANTIZING = (
    "bits",
    "rank",
    "alpha",
    "rslora",
    "dropout",
    "target_modules",
    "method",
    "calibration",
    "group_size",
    "num_labels",
)
_PROMPTED = ("sft", "gsm8k")  # tasks whose prompts can be written with a chat template
# They may change in a resumed run, the result does not.
_FREE = ("report_to", "save_steps", "output", "push_to_hub", "offload")
BATCH = 8  # examples of a step on each device, where none are given
_SPLIT = {"batch_size": BATCH, "gradient_accumulation": 1, "gradient_checkpointing": False}
_SAME = "the value of DIR, or as in `loftq quantize`"


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The settings of `loftq train`. Raises OptionError for a value that no training can have."""

    model: str = setting("", "Folder that `loftq quantize` wrote, or a model.", "model", hidden=True)
    adapter: str | None = setting(
        None,
        "Way to train a model that is not quantized: lora, qlora or qalora.",
        "model",
        choices=MODES,
        usual="qlora",
    )
    task: str = setting("sft", "Task to learn; see below.", "data", choices=TRAINING_TASKS)
    data: tuple[str, ...] = setting(
        (),
        "Files (.txt, .jsonl, .csv, .tsv, .parquet), or a data set OWNER/NAME[:CONFIG][@SPLIT] of the Hub.",
        "data",
        repeated=True,
    )
    eval_data: tuple[str, ...] = setting(
        (),
        "Data to evaluate on, named as for --data.",
        "data",
        repeated=True,
        usual="a twentieth of --data is held out",
    )
    columns: Mapping[str, str] = setting(
        dict,
        "Name of the column that plays a role, where it differs from the usual names.",
        "data",
        option="--column",
        metavar="ROLE=NAME",
    )
    chat_template: bool | None = setting(
        None, "Write prompts with the model's chat template.", "data", negative=True, usual="in sft"
    )
    packing: bool = setting(
        False, "Fill rows of --cutoff-len tokens with several examples, which do not attend to each other.", "data"
    )
    cutoff_len: int = setting(
        1024,
        "Number of tokens after which an example is cut off.",
        "data",
        least=8,
        hint="tokens",
        usual="1024, or the longest input of the model",
    )
    max_source_length: int | None = setting(
        None, "Largest number of tokens in a prompt or document.", "data", least=1, usual="--cutoff-len"
    )
    max_target_length: int | None = setting(
        None, "Largest number of tokens in an answer or summary.", "data", least=1, usual="--cutoff-len"
    )
    num_labels: int | None = again(
        QuantizeSettings, "num_labels", help="Number of classes; 1 to learn numbers.", group="data"
    )
    bits: float | None = again(QuantizeSettings, "bits", usual=_SAME)
    method: str | None = again(QuantizeSettings, "method", usual=_SAME)
    group_size: int | None = again(QuantizeSettings, "group_size", usual=_SAME)
    calibration: str | None = again(QuantizeSettings, "calibration")
    rank: int | None = again(QuantizeSettings, "rank", usual=_SAME)
    alpha: float | None = again(QuantizeSettings, "alpha", usual=_SAME)
    rslora: bool | None = again(QuantizeSettings, "rslora")
    dropout: float | None = again(QuantizeSettings, "dropout", usual=_SAME)
    target_modules: tuple[str, ...] | None = again(QuantizeSettings, "target_modules", usual=_SAME)
    epochs: float = setting(3.0, "Number of passes over the data.", "training", above=0, most=1e6)
    max_steps: int | None = setting(None, "Number of steps, instead of epochs.", "training", least=1)
    learning_rate: float | None = setting(
        None, "Peak learning rate.", "training", above=0, below=10, hint="such as 2e-4", usual="see Adapters below"
    )
    lr_scheduler: str = setting(SCHEDULER, "Schedule of the learning rate, by its name in transformers.", "training")
    warmup_steps: int | None = setting(
        None, "Number of steps in which the rate rises.", "training", least=0, usual="--warmup-ratio"
    )
    warmup_ratio: float = setting(0.03, "Part of the steps in which the rate rises.", "training", least=0, below=1)
    weight_decay: float = setting(0.0, "Weight decay.", "training", least=0)
    batch_size: int | None = setting(
        None,
        "Number of examples on each device at a time.",
        "training",
        least=1,
        usual="8, or fewer with more accumulation if the memory is small",
    )
    eval_batch_size: int = setting(
        8, "Number of examples on each device in a step of the evaluation.", "training", least=1
    )
    gradient_accumulation: int | None = setting(
        None,
        "Number of batches whose gradients are summed before a step.",
        "training",
        least=1,
        usual="1, or what keeps the 8 examples of a step together",
    )
    gradient_checkpointing: bool | None = setting(
        None,
        "Compute activations again in the backward pass: less memory, a third slower.",
        "training",
        negative=True,
        usual="if the memory is too small without",
    )
    optim: str | None = setting(
        None,
        "Optimizer, by its name in transformers.",
        "training",
        usual="paged_adamw_8bit on CUDA, adamw_torch elsewhere",
    )
    seed: int = setting(0, "Seed of the order of the examples and of dropout.", "training", least=0, most=2**32 - 1)
    set: Mapping[str, Any] = setting(
        dict, "Any other argument of TrainingArguments.", "training", metavar="NAME=VALUE", json_values=True
    )
    eval_steps: int | None = setting(
        None, "Number of steps between two evaluations.", "evaluation", least=1, usual="ten evaluations a run"
    )
    output: str = setting("", "Folder to write: the adapter, checkpoints, training.json.", "output", metavar="DIR")
    save_steps: int | None = setting(
        None, "Number of steps between two checkpoints.", "output", least=1, usual="ten a run; the last two are kept"
    )
    report_to: tuple[str, ...] = setting((), "Where to log: tensorboard, wandb and others.", "output", repeated=True)
    push_to_hub: str | None = setting(
        None,
        "Push the model to this repository with the adapter in a subfolder, as `loftq push` does.",
        "hub",
        metavar="REPO_ID",
    )
    dtype: str | None = setting(
        None,
        "Dtype in which the model computes: bfloat16, float16 or float32.",
        "run",
        choices=COMPUTE_DTYPES,
        usual="bfloat16 where the device computes in it",
    )
    cpu: bool = setting(False, "Run on the CPU even if there is a GPU.", "run")
    offload: str | None = setting(
        None,
        "Part of the model that stays in main memory and is copied to the GPU a few at a time: experts.",
        "run",
        choices=OFFLOADS,
    )

    def __post_init__(self) -> None:
        check(self)
        roles = TRAINING_TASKS[self.task].roles
        for name in self.columns:
            if name not in roles:
                raise UnknownNameError("column", name, roles)
        if self.chat_template and self.task not in _PROMPTED:
            tasks = " or ".join(_PROMPTED)
            raise OptionError(f"--chat-template: {self.task} has no prompts: leave it out, or use --task {tasks}")
        if self.packing and self.task != "sft":
            raise OptionError(f"--packing: only the examples of --task sft are packed, not those of {self.task}")
        if self.offload and self.adapter in ("lora", "qalora"):
            raise OptionError(
                f"--offload {self.offload}: --adapter {self.adapter} does not quantize experts: use qlora, or "
                "leave --offload out"
            )
        check_set(self.set)
        check_choices(self.lr_scheduler, self.optim)

    @property
    def quantizing(self) -> dict[str, Any]:
        """The given settings of how to quantize, or to adapt, a model that is not an artifact yet."""
        return {name: value for name in QUANTIZING if (value := getattr(self, name)) is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as in a recipe file, without the settings that were not given."""
        values = {name: value for name, value in to_dict(self).items() if value not in (None, (), {})}
        return dict(plain(values))

    def differences(self, earlier: Mapping[str, Any]) -> list[str]:
        """Return the names of settings that differ from those of an earlier run and that change the result."""
        # Earlier versions wrote these defaults into the record.
        mine, earlier = _SPLIT | self.to_dict(), {**_SPLIT, **earlier}
        return sorted(name for name in {*mine, *earlier} if name not in _FREE and mine.get(name) != earlier.get(name))


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    """The settings of a training that do not change its result."""

    resume: bool = setting(False, "Continue from the last checkpoint.", "output")
    overwrite: bool = setting(False, "Replace an earlier training.", "output")
    quiet: bool = setting(True, "Show no progress bar.", "run")


# Names that other programs give to a setting: Python refuses them, with our name; commands and recipes take them.
_OTHERWISE = {name: row.setting for name, row in SYNONYMS.items() if row.setting is not None}
_MISSING = {
    "model": "name a folder that `loftq quantize` wrote, or a model",
    "data": "name files or a data set with --data",
    "output": "name the folder to write with --output",
}


def settings_of(values: Mapping[str, Any]) -> TrainSettings:
    """Make settings from names and plain values. Raises OptionError for an unknown or a missing name."""
    check_names(TrainSettings, values, _OTHERWISE, _OTHERWISE)
    for name, advice in _MISSING.items():
        if not values.get(name):
            raise OptionError(f"no {name} is given: {advice}")
    return from_dict(TrainSettings, {**values, "output": str(Path(str(values["output"])).expanduser())})
