"""A short distillation of the adapter alone: the quantized model learns to answer as the full-precision model does.

The layers are solved one by one, so how their errors add up is in no layer's objective. Distillation minimizes

    KL(p ‖ q) per token,    p the full-precision model's distribution of the next token, q the quantized model's,

over the calibration text, with the backbone fixed. AdamW's rate falls linearly to zero: most is gained at the end,
where steps are small. The probabilities of the likeliest tokens under p are known one by one, those of all others
as one sum (`loftq.calibration.gather` keeps them). A model without a vocabulary learns the last hidden states: the
squared error divided by their own square.

The first rate is chosen so that a step, which grows with the rank, is a fixed part of the distance, which grows with
the root of the divergence. At twice that rate, a good start of rank 64 ends worse than it began.

A part of the text is held out. If the divergence does not fall there, the adapter stays as it was. Of a text of one
window nothing is learned.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from loftq.core.kernels.products import fast_products
from loftq.formats.adapter import Adapter, open_adapter
from loftq.formats.artifact import Artifact
from loftq.models.first_factor import keep_inputs_once
from loftq.models.head_loss import HiddenStates
from loftq.models.heap import own_pages, return_freed
from loftq.models.loading import load_base
from loftq.models.peft_targets import load_adapter
from loftq.models.second_factor import add_in_place
from loftq.models.tasks import part_before_head, recorded_task
from loftq.solving.divergence import Window, divergence_of

_HIGHEST_RATE = 2e-4  # at a scaling of one
_REACH = 0.018  # rate times rank, divided by the root of the divergence
_WARMUP = 0.05  # part of the steps
_HELD_OUT = 16  # one window of so many is held out
_STEP_TOKENS = 1024  # tokens in a step, or one window if that is longer
LARGE = 300_000_000  # number of weights from which blocks keep only their inputs for the backward pass


@dataclass(frozen=True)
class Refinement:
    """The divergence on held-out text before and after `steps`: in nats per token, or relative for hidden states."""

    before: float
    after: float
    steps: int


def refine(
    artifact: Artifact, teacher: Window, steps: int, device: torch.device, *, seed: int, quiet: bool
) -> tuple[Refinement, dict[str, torch.Tensor]]:
    """Distill into the adapter of an artifact. Returns the result and the factors by their names in the adapter's file.

    `teacher` holds a model's inputs and answers, as `Statistics.teacher` returns them. The adapter's file is not
    changed. No factors are returned if the divergence on held-out text did not fall.
    """
    # products in float32 are faster on a CPU
    base = load_base(artifact, True, {"": device}, torch.float32 if device.type == "cpu" else None)
    model = load_adapter(base, artifact.adapter, is_trainable=True)
    keep_inputs_once(model)
    add_in_place(model)
    adapter = open_adapter(artifact.adapter)
    if _weights(adapter) > LARGE:
        cast(Any, model).gradient_checkpointing_enable()
    core = part_before_head(base, recorded_task(artifact.manifest))
    rank, scaling = int(adapter.config["r"]), adapter.scaling
    with fast_products():
        refinement = learn(model, core, teacher, steps, rank, scaling, device, seed=seed, quiet=quiet)
    if not refinement.steps:
        return refinement, {}
    factors = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    return refinement, {name.replace(".default", ""): p for name, p in factors.items()}


def learn(
    model: PeftModel,
    core: nn.Module,
    teacher: Window,
    steps: int,
    rank: int,
    scaling: float,
    device: torch.device,
    *,
    seed: int,
    quiet: bool,
) -> Refinement:
    """Train the factors of a model until `core`, its part that answers, answers as the teacher does.

    The factors change even if the result says 0 steps; they are of no use then.
    """
    _prepare(model)
    windows = [{name: rows[at] for name, rows in teacher.items()} for at in range(len(teacher["input_ids"]))]
    held_out = windows[-max(len(windows) // _HELD_OUT, 1) :]
    learned = windows[: -len(held_out)]
    states = HiddenStates(core)
    before = after = _divergence(core, states, held_out, device)
    if learned:
        _train(model, core, states, learned, steps, _rate(rank, scaling, before), device, seed, quiet)
        after = _divergence(core, states, held_out, device)
    return Refinement(before, after, steps) if after < before else Refinement(before, before, 0)


def windows_a_step(length: int) -> int:
    """The number of windows of `length` tokens in a step."""
    return max(_STEP_TOKENS // length, 1)


def _weights(adapter: Adapter) -> int:
    """The number of weights in the linears that an adapter adapts."""
    pairs = ([adapter.shapes[key] for key in adapter.keys(module)] for module in adapter.modules)
    experts = (max(adapter.experts(module), 1) for module in adapter.modules)
    return sum(count * a[1] * (adapter.pool_size or 1) * b[0] for (a, b), count in zip(pairs, experts, strict=True))


def _rate(rank: int, scaling: float, before: float) -> float:
    """The first rate of AdamW. The scaling is divided out, so that steps of s·B·A do not depend on it."""
    return min(_HIGHEST_RATE, _REACH * math.sqrt(max(before, 0.0)) / rank) / math.sqrt(scaling)


class _Distiller(Trainer):
    """A trainer whose loss is the divergence of `core`, the part of the model that answers."""

    core: nn.Module
    states: HiddenStates

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:  # noqa: ARG002
        """The divergence of a batch."""
        return_freed(self.args.device)
        return divergence_of(self.core, self.states, inputs)


class _Steps(TrainerCallback):
    """Advances a progress bar."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Advance by one step."""
        self._bar.update(1)


def _batched(windows: Iterable[Window]) -> dict[str, torch.Tensor]:
    rows = list(windows)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _prepare(model: nn.Module) -> None:
    """Let only the factors train, without dropout: the teacher answered with the whole model.

    Families that call dropout as a function (BART, OPT, T5) hold its probability as a number in their modules.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    base: Any = model
    base.config.use_cache = False


@torch.no_grad()
def _divergence(core: nn.Module, states: HiddenStates, windows: Iterable[Window], device: torch.device) -> float:
    core.eval()
    divergences = []
    for window in windows:
        batch = {name: tensor.to(device) for name, tensor in _batched([window]).items()}
        divergences.append(float(divergence_of(core, states, batch)))
    return sum(divergences) / len(divergences)


def _train(
    model: nn.Module,
    core: nn.Module,
    states: HiddenStates,
    windows: Sequence[Window],
    steps: int,
    rate: float,
    device: torch.device,
    seed: int,
    quiet: bool,
) -> None:
    length = len(windows[0]["input_ids"])
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=windows_a_step(length),
            learning_rate=rate,
            lr_scheduler_type="linear",
            warmup_steps=max(round(_WARMUP * steps), 1),
            adam_beta2=0.95,
            max_grad_norm=0.0,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type != "cpu",
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=seed % 2**32,
        )
        trainer = _Distiller(model=model, args=arguments, train_dataset=windows, data_collator=_batched)
        trainer.core, trainer.states = core, states
        for printing in (PrinterCallback, ProgressCallback):  # they print to stdout, which is the report's
            trainer.remove_callback(printing)
        bar = tqdm(total=steps, unit="step", disable=quiet, dynamic_ncols=True, desc="refine")
        with bar, own_pages(device):
            trainer.add_callback(_Steps(bar))
            trainer.train()
