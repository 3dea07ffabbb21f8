"""Opens a model with its adapter, to train it or to use it: from an artifact or a full-precision model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoConfig

from loftq.errors import ArtifactError, OptionError
from loftq.formats.artifact import Artifact, refuse_start
from loftq.formats.model_config import check_beside, read_config
from loftq.formats.prequantized import READABLE
from loftq.hub.source import Source, find_recorded
from loftq.models.adapters import check_shapes, foreign_adapter, is_exported_from
from loftq.models.devices import compute_dtype
from loftq.models.expert_offload import refusal
from loftq.models.input_gradients import require_input_gradients
from loftq.models.loading import guard_cpu, load_base, load_qalora, load_qlora
from loftq.models.merged import WITH_ADAPTER, load_merged
from loftq.models.peft_targets import adapt, load_adapter
from loftq.models.refusals import explain_loading
from loftq.models.tasks import TASKS, Task, auto_class, build_meta, peft_type, recorded_task
from loftq.planning.old_start import warn_of_unused
from loftq.planning.plan import Plan, adapted_names
from loftq.planning.planner import make_plan
from loftq.planning.recipe import recipe_of
from loftq.planning.settings import QuantizeSettings
from loftq.planning.weights import refuse_narrow
from loftq.settings import option_name, plain
from loftq.training import tasks
from loftq.training.encoding import load_tokenizer
from loftq.training.model import Model
from loftq.training.opened import Opened
from loftq.training.settings import TrainSettings
from loftq.training.tasks.task import CLASSIFIER

OF_FOREIGN = ("rank", "alpha", "dropout", "target_modules", "group_size")  # for a GPTQ checkpoint; its pools are groups


def mode_of(settings: TrainSettings, backbone: Model) -> str:
    """The name in MODES of how the adapter trains: as the settings say, or else as fits the backbone.

    A full-precision model trains as QLoRA by default.
    """
    if settings.adapter is not None:
        return settings.adapter
    if isinstance(backbone, Artifact):
        check_artifact(settings, backbone)
        return str(backbone.manifest["kind"])
    return "qalora" if isinstance(backbone, Path) else "qlora"


def quantizing_of(settings: TrainSettings, source: Source) -> dict[str, Any]:
    """The settings by name with which a full-precision model is quantized, or for a plain LoRA only adapted.

    Raises OptionError if they do not fit the adapter or the task.
    """
    options = settings.quantizing
    if settings.adapter == "lora":
        for name in set(options) & {"bits", "method", "calibration", "group_size"}:
            raise OptionError(
                f"{option_name(name)} {options[name]}: --adapter lora does not quantize: leave the option out"
            )
    options["adapter"] = "qalora" if settings.adapter == "qalora" else "lora"
    meta: Any
    meta, own = build_meta(source.folder)
    training_task = tasks.TRAINING_TASKS[settings.task]
    model_task = own.name
    if CLASSIFIER in training_task.models:  # a classifier's head can be added to any model
        model_task = CLASSIFIER
        if own.name != CLASSIFIER:  # a classifier keeps its own head
            options.setdefault("num_labels", 2)
    elif own.name == "feature-extraction" and meta.config.is_encoder_decoder:  # BART's config does not name a head
        model_task = "seq2seq-lm"
    tasks.require(settings.task, model_task, settings.model)
    options["task"] = None if model_task == own.name else model_task
    return options


def check_artifact(settings: TrainSettings, artifact: Artifact) -> None:
    """Raise OptionError if the settings contradict the quantization, the adapter or the task of an artifact.

    Raises ArtifactError for a merged folder, which has no adapter to train.
    """
    refuse_start(artifact)
    kind, recipe = artifact.manifest["kind"], artifact.manifest["recipe"]
    if kind not in WITH_ADAPTER:
        raise ArtifactError(
            f"{artifact.folder} is a {kind} folder, which has no adapter to train: name the folder that it was made "
            "from, or one that was merged with --to bf16, which is quantized like any model"
        )
    tasks.require(settings.task, artifact.manifest["source"]["task"], str(artifact.folder))
    if settings.adapter not in (None, kind):
        raise OptionError(
            f"--adapter {settings.adapter}: {artifact.folder} is a {kind} artifact: leave the option out, or name the "
            "full-precision model instead"
        )
    for name, value in settings.quantizing.items():
        if recipe.get(name) != plain(value):
            raise OptionError(
                f"{option_name(name)} {value}: {artifact.folder} is quantized already, with {recipe.get(name)}: leave "
                "the option out, or quantize the model again"
            )


def check_foreign(settings: TrainSettings, folder: Path) -> None:
    """Raise OptionError for an adapter or a quantization setting that a GPTQ checkpoint from another program fixes."""
    if settings.adapter not in (None, "qalora"):
        raise OptionError(
            f"--adapter {settings.adapter}: {folder} is a GPTQ checkpoint: leave the option out, or use "
            "--adapter qalora"
        )
    for name in sorted(set(settings.quantizing) - set(OF_FOREIGN)):
        raise OptionError(
            f"{option_name(name)}: {folder} is quantized already, and not by loftq: only "
            f"{', '.join(map(option_name, OF_FOREIGN))} can be set"
        )


def loader_of(artifact: Artifact) -> Callable[..., PeftModel]:
    """The function that loads an artifact: `load_qalora` or `load_qlora`."""
    return load_qalora if artifact.manifest["kind"] == "qalora" else load_qlora


def offloading(offload: str | None, backbone: Model) -> dict[str, Any]:
    """The arguments with which an artifact is loaded for `--offload`.

    Raises OptionError for a model whose experts are not quantized, and for one of several processes.
    """
    if offload is None:
        return {}
    if not isinstance(backbone, Artifact) or backbone.manifest["kind"] != "qlora":
        raise OptionError(refusal(str(getattr(backbone, "folder", backbone))))
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise OptionError(f"--offload {offload}: works in one process: run it without torchrun, or leave it out")
    return {"offload": offload}


def open_to_train(settings: TrainSettings, backbone: Model, device: torch.device) -> Opened:
    """Open a backbone, as `quantized` returns it, with an adapter to train. Raises OptionError."""
    dtype = compute_dtype(settings.dtype, device)
    place = {"": device}
    options = offloading(settings.offload, backbone)
    if isinstance(backbone, Artifact):
        model: Any = loader_of(backbone)(backbone.folder, device_map=place, dtype=dtype, **options)
        task = recorded_task(backbone.manifest)
        return Opened(model, load_tokenizer(backbone.folder, model), task, backbone.folder)
    if isinstance(backbone, Path):
        tasks.require(settings.task, "causal-lm", str(backbone))
        check_foreign(settings, backbone)
        options |= {
            "rank": settings.rank or QuantizeSettings.rank,
            "alpha": settings.alpha,
            "pool_size": settings.group_size,
            "dropout": settings.dropout or 0.0,
            "target_modules": settings.target_modules,
        }
        model = load_qalora(backbone, device_map=place, dtype=dtype, **options)
        return Opened(model, load_tokenizer(backbone, model), TASKS["causal-lm"], backbone)
    plan = make_plan(backbone, recipe_of(**quantizing_of(settings, backbone)), with_experts=False)
    base = load_dense(backbone, plan.task, dtype, device, num_labels=plan.recipe.num_labels)
    require_input_gradients(base)
    model = adapt(base, lora_config(plan))
    return Opened(model, load_tokenizer(backbone.folder, model), plan.task, backbone.folder)


def lora_config(plan: Plan) -> LoraConfig:
    """The configuration of a plain LoRA on the modules and parameters that a plan adapts."""
    return LoraConfig(
        r=plan.recipe.rank,
        lora_alpha=cast(int, plan.recipe.alpha),
        lora_dropout=plan.recipe.dropout,
        use_rslora=plan.recipe.rslora,
        modules_to_save=list(plan.modules_to_save) or None,
        task_type=peft_type(plan.task, plan.model),
        **adapted_names(plan),
    )


def load_dense(
    source: Source, task: Task, dtype: torch.dtype, device: torch.device, *, num_labels: int | None = None
) -> Any:
    """Load a full-precision model. Raises CheckpointError for 8-bit weights that no configuration explains."""
    quantization = read_config(source.folder).get("quantization_config")
    if quantization is None:
        for spec in source.checkpoint.tensors.values():
            refuse_narrow(spec)
    options: dict[str, Any] = {}
    check_beside(source.folder)
    with explain_loading(source.folder):
        if num_labels is not None:
            options = _resized(source.folder, num_labels)
        if quantization and quantization.get("quant_method") in READABLE:
            config = options.get("config") or AutoConfig.from_pretrained(source.folder)
            config.quantization_config = {**quantization, "dequantize": True}
            options["config"] = config
        model = auto_class(task).from_pretrained(source.folder, dtype=dtype, device_map={"": device}, **options)
    guard_cpu(model)
    return model


def _resized(folder: Path, num_labels: int) -> dict[str, Any]:
    """Options for a classifier's head. One of another size than that of the folder is new, and has no problem type."""
    config = AutoConfig.from_pretrained(folder)
    if config.num_labels == num_labels:
        return {}
    config.problem_type = None
    config.num_labels = num_labels
    return {"config": config, "ignore_mismatched_sizes": True}


def open_to_use(
    backbone: Model, adapter: str | None, device: torch.device, dtype: torch.dtype, offload: str | None = None
) -> Opened:
    """Open a model with a trained adapter or, without one, with the initial adapter that only an artifact has.

    Raises ArtifactError for an adapter that was trained on another backbone, and OptionError for an `offload` that the
    model cannot have.
    """
    place = {"": device}
    options: dict[str, Any] = {"is_trainable": False, "device_map": place, "dtype": dtype}
    options |= offloading(offload, backbone)
    model: Any
    if isinstance(backbone, Artifact) and backbone.manifest["kind"] not in WITH_ADAPTER:
        if adapter is not None:
            raise ArtifactError(f"{backbone.folder} is a merged model, which takes no adapter: leave --adapter out")
        model, task = load_merged(backbone, place, dtype)
        folder = backbone.folder
    elif isinstance(backbone, Artifact):
        if adapter is not None and is_exported_from(backbone, Path(adapter)):
            model = load_adapter(load_base(backbone, False, place, dtype), Path(adapter), is_trainable=False)
        else:
            model = loader_of(backbone)(backbone.folder, adapter, **options)
        task, folder = recorded_task(backbone.manifest), backbone.folder
    elif isinstance(backbone, Path):
        if adapter is None:
            model = load_base(backbone, False, place, dtype)
        else:
            model = load_qalora(backbone, adapter, is_trainable=False, device_map=place, dtype=dtype)
        task, folder = TASKS["causal-lm"], backbone
    else:
        folder = backbone.folder
        model, task = _dense_to_use(backbone, None if adapter is None else Path(adapter), dtype, device)
    model.eval()
    return Opened(model, load_tokenizer(folder, model, adapter), task, folder)


def _dense_to_use(source: Source, adapter: Path | None, dtype: torch.dtype, device: torch.device) -> tuple[Any, Task]:
    if adapter is None:
        warn_of_unused(source)
        task = build_meta(source.folder)[1]
        return load_dense(source, task, dtype, device), task
    trained = foreign_adapter(adapter, source.name, source.checkpoint)
    own = build_meta(source.folder)[1]
    alike = [task for task in TASKS.values() if task.peft_type == str(trained.config.get("task_type"))]
    task = own if own in alike or not alike else alike[0]
    rows = [trained.shapes[name][0] for name in trained.saved.values() if len(trained.shapes[name]) == 2]
    # If a head has two layers, the last one has as many rows as there are labels.
    labels = min(rows) if rows and task.name.endswith("-classification") else None
    base = load_dense(source, task, dtype, device, num_labels=labels)
    check_shapes(base, trained, source.name)
    return load_adapter(base, adapter), task


def load_source(name: str, artifact: Artifact, device: torch.device, dtype: torch.dtype) -> Opened:
    """Load the full-precision model that an artifact was made from, for the same task. Raises SourceError."""
    recipe = artifact.manifest["recipe"]
    source = find_recorded(name, artifact.manifest["source"]["revision"])
    task = recorded_task(artifact.manifest)
    model = load_dense(source, task, dtype, device, num_labels=recipe["num_labels"])
    model.eval()
    return Opened(model, load_tokenizer(source.folder, model), task, source.folder)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count the parameters that train, and all of them. A quantized weight counts as one parameter."""
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
