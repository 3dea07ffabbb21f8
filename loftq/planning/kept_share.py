"""The share of all weights of a model that stays in 16 bits, for models of which that is more than the usual parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import nn

from loftq.models.language_part import language_part, part_outside
from loftq.models.linears import Linears

if TYPE_CHECKING:
    from loftq.planning.plan import Plan


def kept_share(plan: Plan, linears: Linears, experts: Mapping[str, str]) -> Iterator[str]:
    """A note for a model that reads more than text, and for one with fused experts; `experts` stay for reasons."""
    part = language_part(plan.model, plan.task.name, list(linears.candidates))
    if part is None and not plan.stacks and not experts:
        return
    sizes = {name: parameter.numel() for name, parameter in plan.model.named_parameters()}
    quantized = {layer.module for layer in plan.stacks} | {f"{layer.module}.weight" for layer in plan.linears}
    vocabulary = set(_vocabulary(plan.model))
    parts = Counter({"fused experts": 0, "embeddings and head": 0})
    others = "norms, routers and other parameters"
    for name, size in sizes.items():
        outside = None if part is None else part_outside(name, part)
        if name in experts:
            parts["fused experts"] += size
        elif name in vocabulary:
            parts["embeddings and head"] += size
        elif name not in quantized:
            parts[outside or others] += size
    rest = parts.pop(others, 0)
    listed = [f"{name} {size / sum(sizes.values()):.1%}" for name, size in {**parts, others: rest}.items() if size > 0]
    kept = (sum(parts.values()) + rest) / sum(sizes.values())
    yield f"{kept:.1%} of the weights stay in {plan.recipe.compute_dtype}: {', '.join(listed)}"


def _vocabulary(model: nn.Module) -> list[str]:
    """The names of the weights of the embeddings and the output head."""
    layers = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layers.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError):  # a model without them
            continue
    weights = {id(layer.weight) for layer in layers if layer is not None and hasattr(layer, "weight")}
    return [name for name, parameter in model.named_parameters() if id(parameter) in weights]
