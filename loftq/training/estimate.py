"""Estimates the memory of a training before any weight is read, from a batch of the longest examples."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from loftq.artifacts.backbone import backbone_of
from loftq.display import one_line
from loftq.errors import OptionError
from loftq.formats.adapter import CONFIG, open_adapter
from loftq.formats.artifact import Artifact
from loftq.models.devices import compute_dtype, device_to_run
from loftq.models.expert_moves import bytes_at_hand
from loftq.models.expert_offload import refusal
from loftq.models.packed_experts import PackedExperts, pack_stacks
from loftq.models.peft_targets import adapt
from loftq.models.positions import longest_input
from loftq.models.refusals import explain_loading
from loftq.models.tasks import build_meta
from loftq.models.training_memory import kept_bytes, trained_bytes
from loftq.planning.planner import make_plan
from loftq.planning.recipe import recipe_of
from loftq.training.arguments import default_optimizer
from loftq.training.model import find_model
from loftq.training.open_model import check_artifact, lora_config, quantizing_of
from loftq.training.settings import TrainSettings, settings_of
from loftq.training.tasks import TRAINING_TASKS


@dataclass(frozen=True)
class Estimate:
    """An estimate of the memory on each device, in bytes, without that of the program itself."""

    model: str
    trainable: int
    total: int
    batch: tuple[int, int]  # examples, tokens
    weights: int
    adapter: int  # with its gradients and the optimizer's state
    activations: int
    experts: int  # the group that is unpacked, and with `--offload` the codes of the groups that are on the device
    offloaded: int  # the codes and scales of all experts, in main memory instead of on the device

    @property
    def memory(self) -> int:
        """The sum of all parts on the device, in bytes."""
        return self.weights + self.adapter + self.activations + self.experts

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**asdict(self), "batch": list(self.batch), "memory": self.memory}

    def table(self) -> str:
        """Return the figures as text for a person."""
        share = 100 * self.trainable / self.total
        rows, tokens = self.batch
        lines = [
            f"{self.trainable:,} of {self.total:,} parameters train ({share:.2f} %)",
            f"{self.weights / 1e9:8.2f} GB  weights",
            f"{self.adapter / 1e9:8.2f} GB  adapter, its gradients, the optimizer",
            f"{self.activations / 1e9:8.2f} GB  activations of {rows} examples of {tokens} tokens",
            *([f"{self.experts / 1e9:8.2f} GB  experts that are unpacked at a time"] if self.experts else []),
            f"{self.memory / 1e9:8.2f} GB  in all, on each device, without the program itself",
            *([f"{self.offloaded / 1e9:8.2f} GB  in main memory besides: the experts"] if self.offloaded else []),
            "To use less, lower --batch-size or --cutoff-len, or add --gradient-checkpointing.",
        ]
        return "\n".join(lines)


def estimate(model: str | None = None, **settings: Any) -> Estimate:
    """Estimate the memory that `train` needs with these settings.

    Nothing is written, and only the headers of the weights are read. Raises LoftQError.
    """
    train_settings = settings_of({"model": model, **settings})
    device = device_to_run(train_settings.cpu)
    dtype = compute_dtype(train_settings.dtype, device)
    adapted, trainable, frozen, weights = _on_meta(train_settings, dtype)
    experts, offloaded = _experts(adapted, train_settings, device)
    total = trainable + frozen
    batch = train_settings.batch_size, min(train_settings.cutoff_len, longest_input(adapted))
    optimizer = train_settings.optim or default_optimizer(device)
    try:
        model_tasks = TRAINING_TASKS[train_settings.task].models
        activations = kept_bytes(
            adapted, batch, model_tasks, device, checkpointing=train_settings.gradient_checkpointing
        )
    except (RuntimeError, ValueError) as error:  # an operator without a meta kernel raises the former
        reason = one_line(error, 200)
        raise OptionError(
            f"--dry-run: {type(adapted.get_base_model()).__name__} does not run in {dtype} without its weights "
            f"({reason}): try another --dtype, or train with --max-steps 1"
        ) from error
    return Estimate(
        model=train_settings.model,
        trainable=trainable,
        total=total,
        batch=batch,
        weights=weights - offloaded,
        adapter=trained_bytes(trainable, optimizer),
        activations=activations,
        experts=experts,
        offloaded=offloaded,
    )


def _experts(model: Any, settings: TrainSettings, device: torch.device) -> tuple[int, int]:
    """Bytes of the packed experts that are at hand at a time, of one module after the other, and of the offloaded ones.

    Raises OptionError if there are none to offload.
    """
    modules: list[Any] = [module for module in model.modules() if isinstance(module, PackedExperts)]
    offloads = settings.offload is not None
    if offloads and not modules:
        raise OptionError(refusal(settings.model))
    at_hand = max((bytes_at_hand(module, device, offloaded=offloads) for module in modules), default=0)
    packed = [tensor.nbytes for module in modules for tensor in module.packed_tensors().values()]
    return at_hand, sum(packed) if offloads else 0


def _on_meta(settings: TrainSettings, dtype: torch.dtype) -> tuple[Any, int, int, int]:
    """Return the model with its adapter on the meta device, the numbers of parameters that train and that do not, and
    the bytes of the latter.
    """
    backbone = find_model(settings.model)
    if isinstance(backbone, Path):
        raise OptionError(
            f"--dry-run: {backbone} is a GPTQ checkpoint that loftq did not write, which has no estimate: its "
            "weights take as much memory as its files"
        )
    if isinstance(backbone, Artifact):
        check_artifact(settings, backbone)
        recipe, adapter = backbone.manifest["recipe"], open_adapter(backbone.adapter)
        task = backbone.manifest["source"]["task"]
        model, _ = build_meta(backbone.folder, task=task, num_labels=recipe["num_labels"], dtype=dtype)
        with explain_loading(backbone.adapter, CONFIG):
            config = LoraConfig.from_pretrained(backbone.adapter)
        trainable = sum(math.prod(shape) for shape in adapter.shapes.values())
        weights = int(backbone.manifest["totals"]["backbone_bytes"])
        stored = backbone_of(backbone)
        stacks = {name: (stored.grids[name], stored.shapes[name]) for name in stored.stacks}
    else:
        options = quantizing_of(settings, backbone)
        plan = make_plan(backbone, recipe_of(**options), with_experts=settings.adapter != "lora")
        model, _ = build_meta(backbone.folder, task=plan.task.name, num_labels=plan.recipe.num_labels, dtype=dtype)
        config = lora_config(plan)
        trainable = plan.trained_parameters
        stacks = {layer.module: (plan.grid(layer), layer.shape) for layer in plan.stacks}
        weights = plan.backbone_bytes
        if settings.adapter == "lora":
            weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    config.inference_mode = False
    config.use_qalora = False  # QA-LoRA needs quantized linears; a plain LoRA keeps at least as much
    origin = backbone.adapter if isinstance(backbone, Artifact) else backbone.folder
    hidden = sum(model.get_parameter(name).numel() for name in stacks)
    pack_stacks(model, stacks, "meta")
    with explain_loading(origin, CONFIG), torch.device("meta"):
        adapted: Any = adapt(model, config)
    frozen = [p for p in adapted.parameters() if not p.requires_grad and p.is_floating_point()]
    return adapted, trainable, hidden + sum(parameter.numel() for parameter in frozen), weights
