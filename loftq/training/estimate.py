"""What a training will need, before any weight is read: it is counted on a batch of the longest examples."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from loftq.display import one_line
from loftq.errors import OptionError
from loftq.formats.adapter import open_adapter
from loftq.formats.artifact import Artifact
from loftq.models.devices import compute_dtype, device_to_run
from loftq.models.positions import longest_input
from loftq.models.tasks import build_meta
from loftq.models.training_memory import kept_bytes, trained_bytes
from loftq.planning.planner import make_plan
from loftq.planning.recipe import recipe_of
from loftq.training.arguments import default_optimizer
from loftq.training.model import find_model
from loftq.training.opening import check_artifact, lora_config, quantizing_of
from loftq.training.settings import TrainSettings, settings_of
from loftq.training.tasks import TRAINING_TASKS


@dataclass(frozen=True)
class Estimate:
    """Bytes, above the program itself, on one device."""

    model: str
    trainable: int
    total: int
    batch: tuple[int, int]  # examples, tokens
    weights: int
    adapter: int  # with its gradients and what the optimizer keeps
    activations: int

    @property
    def memory(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.activations

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "batch": list(self.batch), "memory": self.memory}

    def table(self) -> str:
        """The figures, for a person."""
        share = 100 * self.trainable / self.total
        rows, tokens = self.batch
        lines = [
            f"{self.trainable:,} of {self.total:,} parameters train ({share:.2f} %)",
            f"{self.weights / 1e9:8.2f} GB  weights",
            f"{self.adapter / 1e9:8.2f} GB  adapter, its gradients, the optimizer",
            f"{self.activations / 1e9:8.2f} GB  activations of {rows} examples of {tokens} tokens",
            f"{self.memory / 1e9:8.2f} GB  together, on each device, beside the program",
            "Lower --batch-size or --cutoff-len, or add --gradient-checkpointing, for less.",
        ]
        return "\n".join(lines)


def estimate(model: str | None = None, **settings: Any) -> Estimate:
    """What `train` needs with these settings. Nothing is written, and of weights headers alone are read."""
    asked = settings_of({"model": model, **settings})
    device = device_to_run(asked.cpu)
    dtype = compute_dtype(asked.dtype, device)
    adapted, trainable, weights = _on_meta(asked, dtype)
    total = trainable + sum(p.numel() for p in adapted.parameters() if not p.requires_grad)
    batch = asked.batch_size, min(asked.cutoff_len, longest_input(adapted))
    optimizer = asked.optim or default_optimizer(device)
    try:
        able = TRAINING_TASKS[asked.task].models
        kept = kept_bytes(adapted, batch, able, device, checkpointing=asked.gradient_checkpointing)
    except (RuntimeError, ValueError) as error:  # NotImplementedError is the former
        reason = one_line(error, 200)
        raise OptionError(
            f"--dry-run: {type(adapted.get_base_model()).__name__} does not run in {dtype} without its weights "
            f"({reason}): try another --dtype, or a training of one step"
        ) from error
    return Estimate(asked.model, trainable, total, batch, weights, trained_bytes(trainable, optimizer), kept)


def _on_meta(settings: TrainSettings, dtype: torch.dtype) -> tuple[Any, int, int]:
    """The model with its adapter, without memory; how many parameters train; and how many bytes the others take."""
    found = find_model(settings.model)
    if isinstance(found, Path):
        raise OptionError(
            f"--dry-run: {found} is a GPTQ checkpoint that loftq did not write: its size is that of its files"
        )
    if isinstance(found, Artifact):
        check_artifact(settings, found)
        recipe, adapter = found.manifest["recipe"], open_adapter(found.adapter)
        task = found.manifest["source"]["task"]
        model, _ = build_meta(found.folder, task=task, num_labels=recipe["num_labels"], dtype=dtype)
        config = LoraConfig.from_pretrained(found.adapter)
        trainable = sum(math.prod(shape) for shape in adapter.shapes.values())
        weights = int(found.manifest["totals"]["backbone_bytes"])
    else:
        plan = make_plan(found, recipe_of(**quantizing_of(settings, found)))
        model, _ = build_meta(found.folder, task=plan.task.name, num_labels=plan.recipe.num_labels, dtype=dtype)
        config = lora_config(plan)
        trainable = plan.trained_parameters
        weights = plan.backbone_bytes
        if settings.adapter == "lora":
            weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    config.inference_mode = False
    config.use_qalora = False  # which needs a quantized linear; what is kept for it is less
    with torch.device("meta"):
        return get_peft_model(model, config), trainable, weights
