"""How large the statistics of a calibration get, in bytes, from shapes alone: on the disk, and in memory."""

from __future__ import annotations

from math import prod
from typing import Any

from loftq.calibration.observer import TOP, VOCABULARY
from loftq.core.moments import panel_shapes
from loftq.models.training_memory import embedding_width
from loftq.planning.plan import Layer, Plan

_FLOAT32 = 4
_ANSWER_BYTES = 6  # per likeliest token: its index, and its log-probability in 16 bits


def statistics_bytes(plan: Plan, tokens: int, *, answered: bool = True) -> int:
    """The bytes that the statistics of a plan's layers take on the disk, if not more, if a text reaches all of them.

    Linears of one module with the same number of inputs count as if they had the same inputs, as q, k and v have. Where
    `o_proj` has as many inputs as these, its moment is not counted. `answered` says whether the answers are kept.
    """
    moments = {(layer.owner, layer.matrix[1]) for layer in plan.linears}
    summed = sum(prod(shape) for _, size in moments for shape in panel_shapes(size)) * _FLOAT32
    routed = sum(routed_bytes(plan, layer, tokens) for layer in {layer.owner: layer for layer in plan.stacks}.values())
    return summed + routed + (answers_bytes(plan, tokens) if answered else 0)


def routed_bytes(plan: Plan, layer: Layer, tokens: int) -> int:
    """The tokens of an experts module in 16 bits; the choices of the router are few bytes beside them."""
    return 2 * tokens * plan.observed[layer.owner]


def answers_bytes(plan: Plan, tokens: int) -> int:
    """The answers of the model: the likeliest tokens at each position, or the last hidden states in 16 bits."""
    if plan.task.name in VOCABULARY:
        return tokens * min(TOP, vocabulary_of(plan)) * _ANSWER_BYTES
    return tokens * embedding_width(plan.model) * 2


def vocabulary_of(plan: Plan) -> int:
    """The number of tokens that the model knows."""
    model: Any = plan.model
    return int(model.config.get_text_config().vocab_size)
