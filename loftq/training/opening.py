"""A model with the adapter that trains, or that has been trained: from an artifact, or from a full-precision model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from loftq.errors import OptionError
from loftq.formats.artifact import Artifact
from loftq.hub.default_model import default_model
from loftq.hub.source import Source, find_source
from loftq.models.adapters import check_shapes, foreign_adapter
from loftq.models.devices import compute_dtype
from loftq.models.loading import guard_cpu, load_base, load_qalora, load_qlora
from loftq.models.positions import longest_input
from loftq.models.tasks import TASKS, Task, auto_class, build_meta
from loftq.planning.plan import Plan
from loftq.planning.planner import make_plan
from loftq.planning.recipe import recipe_of
from loftq.planning.settings import QuantizeSettings
from loftq.settings import option_name
from loftq.training import tasks
from loftq.training.encoding import load_tokenizer
from loftq.training.model import Model
from loftq.training.settings import TrainSettings


@dataclass(frozen=True)
class Opened:
    """A model with its adapter, its tokenizer, its task, and where the backbone lies."""

    model: Any
    tokenizer: Any
    task: Task
    folder: Path

    def name_backbone(self, name: str) -> None:
        """What the adapter's configuration calls the model that it was trained on."""
        self.model.peft_config["default"].base_model_name_or_path = name

    @property
    def longest(self) -> int:
        """How many tokens the model and its tokenizer take at once."""
        return longest_input(self.model, self.tokenizer.model_max_length)


def mode_of(settings: TrainSettings, found: Model) -> str:
    """How the adapter trains, of MODES: as was said, or as the model is; a full-precision one as QLoRA."""
    own = found.manifest["kind"] if isinstance(found, Artifact) else "qalora" if isinstance(found, Path) else "qlora"
    return settings.adapter or str(own)


def quantizing_of(settings: TrainSettings, source: Source) -> dict[str, Any]:
    """How a full-precision model is quantized, or for a plain LoRA only adapted: a recipe's values by name."""
    options = settings.quantizing
    if settings.adapter == "lora":
        for name in set(options) & {"bits", "method", "calibration", "group_size"}:
            raise OptionError(f"{option_name(name)} {options[name]}: --adapter lora does not quantize")
    options["adapter"] = "qalora" if settings.adapter == "qalora" else "lora"
    meta: Any
    meta, own = build_meta(source.folder)
    wanted = tasks.TRAINING_TASKS[settings.task]
    model_task = own.name
    if tasks.CLASSIFIER in wanted.models:  # any model's body takes a new head
        model_task = tasks.CLASSIFIER
        options.setdefault("num_labels", 2)
    elif own.name == "feature-extraction" and meta.config.is_encoder_decoder:  # BART's config names no head
        model_task = "seq2seq-lm"
    wanted.require(settings.task, model_task, settings.model)
    options["task"] = None if model_task == own.name else model_task
    return options


def check_artifact(settings: TrainSettings, artifact: Artifact) -> None:
    """Raises OptionError where settings ask for another quantization, adapter or task than an artifact has."""
    kind, recipe = artifact.manifest["kind"], artifact.manifest["recipe"]
    tasks.TRAINING_TASKS[settings.task].require(
        settings.task, artifact.manifest["source"]["task"], str(artifact.folder)
    )
    if settings.adapter not in (None, kind):
        raise OptionError(
            f"--adapter {settings.adapter}: {artifact.folder} is a {kind} artifact: leave the option out, or start "
            "from the full-precision model"
        )
    for name, value in settings.quantizing.items():
        if recipe.get(name) != json.loads(json.dumps(value)):
            raise OptionError(
                f"{option_name(name)} {value}: {artifact.folder} is quantized already, with {recipe.get(name)}: leave "
                "the option out, or quantize the model anew"
            )


def _check_foreign(settings: TrainSettings, folder: Path) -> None:
    """Raises OptionError for what a GPTQ checkpoint that loftq did not write leaves no choice of."""
    for name in sorted(set(settings.quantizing) - {"rank", "alpha"}):
        raise OptionError(
            f"{option_name(name)}: {folder} is quantized already, and not by loftq: --rank and --alpha alone are chosen"
        )


def loader_of(artifact: Artifact) -> Callable[..., PeftModel]:
    """What loads an artifact of its kind."""
    return load_qalora if artifact.manifest["kind"] == "qalora" else load_qlora


def open_to_train(settings: TrainSettings, found: Model, device: torch.device) -> Opened:
    """A model as `quantized` gives it, with an adapter to train."""
    dtype = compute_dtype(settings.dtype, device)
    place = {"": device}
    if isinstance(found, Artifact):
        model: Any = loader_of(found)(found.folder, device_map=place, dtype=dtype)
        task = TASKS[found.manifest["source"]["task"]]
        return Opened(model, load_tokenizer(found.folder, model), task, found.folder)
    if isinstance(found, Path):
        tasks.TRAINING_TASKS[settings.task].require(settings.task, "causal-lm", str(found))
        if settings.adapter not in (None, "qalora"):
            raise OptionError(f"--adapter {settings.adapter}: {found} is a GPTQ checkpoint, which qalora trains on")
        _check_foreign(settings, found)
        rank = settings.rank or QuantizeSettings.rank
        model = load_qalora(found, device_map=place, dtype=dtype, rank=rank, alpha=settings.alpha)
        return Opened(model, load_tokenizer(found, model), TASKS["causal-lm"], found)
    plan = make_plan(found, recipe_of(**quantizing_of(settings, found)))
    base = load_dense(found.folder, plan.task, dtype, device, num_labels=plan.recipe.num_labels)
    base.enable_input_require_grads()
    model = get_peft_model(base, lora_config(plan))
    return Opened(model, load_tokenizer(found.folder, model), plan.task, found.folder)


def lora_config(plan: Plan) -> LoraConfig:
    """A plain LoRA of what a plan adapts."""
    return LoraConfig(
        r=plan.recipe.rank,
        lora_alpha=cast(int, plan.recipe.alpha),
        lora_dropout=plan.recipe.dropout,
        target_modules=list(plan.target_modules),
        modules_to_save=list(plan.modules_to_save) or None,
        task_type=plan.task.peft_type,
    )


def load_dense(
    folder: Path, task: Task, dtype: torch.dtype, device: torch.device, *, num_labels: int | None = None
) -> Any:
    """A full-precision model."""
    labels = {} if num_labels is None else {"num_labels": num_labels}
    model = auto_class(task).from_pretrained(folder, dtype=dtype, device_map={"": device}, **labels)
    guard_cpu(model)
    return model


def open_to_use(found: Model, adapter: str | None, device: torch.device, dtype: torch.dtype) -> Opened:
    """A model with a trained adapter, or with the artifact's own start; without one, where it has none.

    Raises ArtifactError for an adapter of another backbone.
    """
    place = {"": device}
    if isinstance(found, Artifact):
        model: Any = loader_of(found)(found.folder, adapter, is_trainable=False, device_map=place, dtype=dtype)
        task, folder = TASKS[found.manifest["source"]["task"]], found.folder
    elif isinstance(found, Path):
        base = load_base(found, False, place, dtype) if adapter is None else None
        model = (
            base if adapter is None else load_qalora(found, adapter, is_trainable=False, device_map=place, dtype=dtype)
        )
        task, folder = TASKS["causal-lm"], found
    else:
        folder = found.folder
        model, task = _dense_to_use(found, None if adapter is None else Path(adapter), dtype, device)
    model.eval()
    return Opened(model, load_tokenizer(folder, model), task, folder)


def _dense_to_use(source: Source, adapter: Path | None, dtype: torch.dtype, device: torch.device) -> tuple[Any, Task]:
    if adapter is None:
        task = build_meta(source.folder)[1]
        return load_dense(source.folder, task, dtype, device), task
    found = foreign_adapter(adapter, source.name, source.checkpoint)
    kinds = {task.peft_type: task for task in TASKS.values() if task.peft_type}
    task = kinds.get(str(found.config.get("task_type"))) or build_meta(source.folder)[1]
    rows = [found.shapes[name][0] for name in found.saved.values() if len(found.shapes[name]) == 2]
    labels = min(rows) if rows and task.name.endswith("-classification") else None  # of a head of two layers the last
    base = load_dense(source.folder, task, dtype, device, num_labels=labels)
    check_shapes(base, found, source.name)
    return PeftModel.from_pretrained(base, adapter), task


def load_source(name: str, artifact: Artifact, device: torch.device, dtype: torch.dtype) -> Opened:
    """The full-precision model that an artifact was made from, as the same task. Raises SourceError."""
    recipe = artifact.manifest["recipe"]
    shipped = default_model()["model"] == name and not Path(name).is_dir()
    source = find_source(None if shipped else name, revision=artifact.manifest["source"]["revision"])
    task = TASKS[artifact.manifest["source"]["task"]]
    model = load_dense(source.folder, task, dtype, device, num_labels=recipe["num_labels"])
    model.eval()
    return Opened(model, load_tokenizer(source.folder, model), task, source.folder)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Those that train, and all: of quantized linears the weights that their codes stand for."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
        own = dict(module.named_parameters(recurse=False))
        if not isinstance(rows, int) or not isinstance(columns, int) or list(module.children()):
            continue
        weight = own.get("weight")
        if weight is None or weight.shape != (rows, columns):
            total += rows * columns - (0 if weight is None else weight.numel())
    return trainable, total
