"""Estimates the size of a planned artifact on disk, loaded, and in training, only from shapes.

The estimate of training is for a step on a single sequence, with gradient checkpointing and Adam, as `load_qlora`
prepares it. In addition to the backbone, it needs these bytes:

    adapter   16 for each parameter: the parameter, its gradient and two moments in float32
    blocks    2 · tokens · width for each block: its input, which is kept
    a block   tokens · Σ (4 · in + 2 · out) over its linears, while it is run again: each input in float32 for the
              adapter's gradient, each output in 16 bits; fused experts keep their inputs in 16 bits
    a linear  2 · in · out: the largest dequantized weight, of a linear or an expert
    logits    16 for each of those that `loftq train` computes at a time: in 16 bits, in float32, their softmax, the
              gradient; where a model caps or scales its logits, 12 · tokens · vocabulary

Logits are not in memory at the same time as the block and the linear, so only the larger of the two sums counts.

This differs from `models.training_memory` on purpose. That module runs the model with its adapter on the meta device,
for the exact batch and options of a training; it takes seconds for each model and needs peft. The zoo shows a figure
for every recipe at once, so this module only uses the shapes of linears. It leaves out norms, activation functions and
outputs of attention, which a block also keeps. For the models of the zoo the two differ by less than a quarter, and a
test checks this.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Any

from loftq.models.head_loss import LOGITS
from loftq.models.tasks import CAUSAL
from loftq.models.training_memory import trained_bytes
from loftq.planning.plan import Plan
from loftq.planning.settings import TOKENS

_LOGIT_BYTES = 12
_CHUNK_BYTES = 16
_CHANGED = ("final_logit_softcapping", "logits_scaling", "logit_scale")  # what configs call a cap or a scale of logits


@dataclass(frozen=True)
class Footprint:
    """Sizes in bytes.

    `disk` is for the files, `load` for the weights in memory and a forward pass on a single token, `train` for a
    training step.
    """

    disk: int
    load: int
    train: int


def footprint(plan: Plan, tokens: int = TOKENS) -> Footprint:
    """Estimate the sizes of a plan, with a training step on `tokens` tokens."""
    disk = plan.backbone_bytes + plan.adapter.nbytes
    item = plan.recipe.dtype.itemsize
    largest = max(prod(layer.matrix) for layer in plan.layers) * item
    blocks: Counter[str] = Counter()
    for layer in plan.layers:
        rows, columns = layer.matrix
        kept_per_token = item * columns if layer.experts else 4 * columns + item * rows
        blocks[_block(layer.module)] += tokens * kept_per_token
    config: Any = plan.model.config.get_text_config()  # type: ignore[operator, union-attr]
    kept = len(blocks) * tokens * int(config.hidden_size) * item
    logits = tokens * int(config.vocab_size)
    streamed = plan.task.name in CAUSAL and not any(getattr(config, name, None) for name in _CHANGED)
    head = min(logits, LOGITS) * _CHUNK_BYTES if streamed else logits * _LOGIT_BYTES
    trained = trained_bytes(plan.trained_parameters)
    working = max(head, max(blocks.values()) + largest)
    return Footprint(disk=disk, load=disk + largest, train=plan.backbone_bytes + trained + kept + working)


def _block(module: str) -> str:
    """The block that a module belongs to: its name up to the first number."""
    prefix = re.match(r"(?:.*?\.)?\d+(?=\.)", module)
    return prefix[0] if prefix else module
