"""How large a planned artifact is, on disk, loaded, and in training: estimates from shapes alone.

Training is one step on one sequence, with gradient checkpointing and Adam, as `load_qlora` prepares it. Beside the
backbone it takes, in bytes:

    adapter   16 for each of its parameters: itself, a gradient and two moments in float32
    blocks    2 · tokens · width for each block, whose input is kept
    a block   tokens · Σ (4 · in + 2 · out) over its linears, when it is run again: each input in float32 for the
              adapter's gradient, each output in 16 bits
    a linear  2 · in · out, the largest, dequantized
    logits    12 · tokens · vocabulary: 16 bits and float32, and the gradients of both

Logits and the block's part are not needed at once: the larger of them counts.

This differs from `models.training_memory` on purpose. That one runs the model on the meta device, with its adapter, for
the very batch and options of a training; it takes seconds a model and needs peft. The zoo shows a figure for each
recipe at once, so here the linears' shapes must do: norms, activation functions and attention's outputs, which a
block's part keeps too, are left out. For the zoo's models the two agree within a quarter, and a test holds them to it.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from loftq.models.training_memory import trained_bytes
from loftq.planning.plan import Plan

TOKENS = 1024
_LOGIT_BYTES = 12


@dataclass(frozen=True)
class Footprint:
    """Bytes: of the files, of the weights in memory with what one forward of a token needs, of a step of training."""

    disk: int
    load: int
    train: int


def footprint(plan: Plan, tokens: int = TOKENS) -> Footprint:
    """The sizes of a plan; a training step sees `tokens` at once."""
    disk = plan.backbone_bytes + plan.adapter.nbytes
    item = plan.recipe.dtype.itemsize
    largest = max(layer.weights for layer in plan.layers) * item
    blocks: Counter[str] = Counter()
    for layer in plan.layers:
        rows, columns = layer.shape
        blocks[_block(layer.module)] += tokens * (4 * columns + item * rows)
    config: Any = plan.model.config.get_text_config()  # type: ignore[operator, union-attr]
    kept = len(blocks) * tokens * int(config.hidden_size) * item
    logits = tokens * int(config.vocab_size) * _LOGIT_BYTES
    trained = trained_bytes(plan.trained_parameters)
    working = max(logits, max(blocks.values()) + largest)
    return Footprint(disk=disk, load=disk + largest, train=plan.backbone_bytes + trained + kept + working)


def _block(module: str) -> str:
    """The block that a module belongs to: its name up to the first number."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.)", module)
    return found[0] if found else module
