"""The memory of a training, from the model with its adapter on the meta device and a batch of the longest examples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from loftq.artifacts.backbone import backbone_of
from loftq.display import one_line
from loftq.errors import OptionError
from loftq.formats.adapter import CONFIG, open_adapter
from loftq.formats.artifact import Artifact
from loftq.models.devices import compute_dtype, device_to_run, free_memory
from loftq.models.expert_moves import bytes_at_hand
from loftq.models.expert_offload import refusal
from loftq.models.packed_experts import PackedExperts, pack_stacks
from loftq.models.peft_targets import adapt
from loftq.models.refusals import explain_loading
from loftq.models.tasks import build_meta
from loftq.models.training_memory import kept_bytes, trained_bytes
from loftq.planning.planner import make_plan
from loftq.planning.recipe import recipe_of
from loftq.training.arguments import default_optimizer
from loftq.training.batches import Split, asked_split, choose_split
from loftq.training.lengths import longest_of
from loftq.training.model import Model
from loftq.training.open_model import check_artifact, lora_config, quantizing_of
from loftq.training.opened import Opened
from loftq.training.prepare import encoder_for
from loftq.training.settings import TrainSettings
from loftq.training.tasks import TRAINING_TASKS


@dataclass(frozen=True)
class OnMeta:
    """A model with its adapter on the meta device, its numbers of parameters, and the bytes of what does not train.

    `experts` are the bytes of those that are unpacked at a time, and `offloaded` of those in main memory, which are not
    among the `weights`.
    """

    model: Any
    trainable: int
    total: int
    weights: int
    experts: int
    offloaded: int

    def activations(
        self, settings: TrainSettings, batch: tuple[int, int], device: torch.device, *, checkpointing: bool
    ) -> int:
        """The bytes that a step keeps of a batch (examples, tokens). Raises OptionError for a model that cannot run."""
        tasks = TRAINING_TASKS[settings.task].models
        try:
            return kept_bytes(self.model, batch, tasks, device, checkpointing=checkpointing)
        except (RuntimeError, ValueError) as error:  # an operator without a meta kernel raises the former
            raise OptionError(
                f"--dry-run: {type(self.model.get_base_model()).__name__} does not run in {self.model.dtype} without "
                f"its weights ({one_line(error, 200)}): try another --dtype, or train with --max-steps 1"
            ) from error

    def adapter_bytes(self, settings: TrainSettings, device: torch.device) -> int:
        """The bytes of what trains, with its gradients and the state of the optimizer."""
        return trained_bytes(self.trainable, settings.optim or default_optimizer(device))

    def fixed_bytes(self, settings: TrainSettings, device: torch.device) -> int:
        """The bytes on the device that do not depend on the batch; those of main memory too if that is the device."""
        held = self.offloaded if device.type == "cpu" else 0
        return self.weights + self.adapter_bytes(settings, device) + self.experts + held


def most_bytes(model: Any, batch: tuple[int, int]) -> int:
    """More bytes than a training of a model without adapter on a batch (examples, tokens) can need, found at once.

    These are float32 weights with an adapter as large and its optimizer, and for each token 16 bytes for every input
    and output of a matrix, and the scores of attention.
    """
    tokens, sides, weights = batch[0] * batch[1], 0, 0
    for parameter in model.parameters():
        weights += parameter.numel()
        sides += sum(parameter.shape[-2:])
    config = model.config.get_text_config()
    layers, heads = (int(getattr(config, name, None) or 16) for name in ("num_hidden_layers", "num_attention_heads"))
    return 24 * weights + tokens * (16 * sides + 8 * layers * heads * batch[1])


def on_meta(settings: TrainSettings, backbone: Model, dtype: torch.dtype) -> OnMeta:
    """Build a model with its adapter on the meta device.

    Raises OptionError for a GPTQ checkpoint of others, and for `--offload` without quantized experts.
    """
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
        tensors = len(backbone.checkpoint.tensors)
        labels, task = plan.recipe.num_labels, plan.task.name
        model, _ = build_meta(backbone.folder, task=task, num_labels=labels, dtype=dtype, tensors=tensors)
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
    total = trainable + hidden + sum(parameter.numel() for parameter in frozen)
    experts, offloaded = _experts(adapted, settings)
    return OnMeta(adapted, trainable, total, weights - offloaded, experts, offloaded)


def _experts(model: Any, settings: TrainSettings) -> tuple[int, int]:
    """Bytes of the packed experts that are at hand at a time, of one module after the other, and of the offloaded ones.

    Raises OptionError if there are none to offload.
    """
    modules: list[Any] = [module for module in model.modules() if isinstance(module, PackedExperts)]
    offloads, device = settings.offload is not None, device_to_run(settings.cpu)
    if offloads and not modules:
        raise OptionError(refusal(settings.model))
    at_hand = max((bytes_at_hand(module, device, offloaded=offloads) for module in modules), default=0)
    packed = [tensor.nbytes for module in modules for tensor in module.packed_tensors().values()]
    return at_hand, sum(packed) if offloads else 0


def fitting_split(
    settings: TrainSettings, prepared: Opened, backbone: Model, examples: Any
) -> tuple[Split, str | None]:
    """Choose how a step is computed so that it fits the device; the second value is a line for the user.

    `prepared` is the model without weights. Nothing is counted where everything certainly fits, and the settings stay
    as asked where it cannot be counted.
    """
    asked, device = asked_split(settings), device_to_run(settings.cpu)
    free = free_memory(device)
    tokens = longest_of(examples, encoder_for(settings, prepared))
    if free is None or 2 * most_bytes(prepared.model, (asked.batch_size, tokens)) < free:
        return asked, None
    try:
        planned = on_meta(settings, backbone, compute_dtype(settings.dtype, device))
        fixed = planned.fixed_bytes(settings, device)

        def need(batch: int, checkpointing: bool) -> int:
            return fixed + planned.activations(settings, (batch, tokens), device, checkpointing=checkpointing)

        return choose_split(settings, need, free)
    except OptionError:  # a model that has no estimate
        return asked, None
