"""The fused experts of a model: parameters that hold one matrix for each expert of a mixture.

transformers computes most of them through an interface of its own (`integrations.moe`), which says how an experts
module is built: whether it has a gate, biases, and transposed weights. Only such modules can be quantized, and only as
a whole: the first projection (`gate_up_proj`, or `up_proj` without a gate) together with `down_proj`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from loftq.models.linears import fused_experts

LAST = "down_proj"


@dataclass(frozen=True)
class ExpertStack:
    """A parameter of `shape` (experts, out, in). If `transposed`, it is stored as (experts, in, out)."""

    shape: tuple[int, int, int]
    transposed: bool = False


@dataclass(frozen=True)
class ExpertStacks:
    """Fused experts by the name of the parameter: `candidates` can be quantized, `others` cannot, for a reason."""

    candidates: Mapping[str, ExpertStack]
    others: Mapping[str, str]


def find_stacks(model: nn.Module) -> ExpertStacks:
    """Sort the fused experts of a model, which may be on the meta device, in the order of the model."""
    owners: dict[str, list[str]] = {}
    for name in fused_experts(model):
        owner, _, last = name.rpartition(".")
        owners.setdefault(owner, []).append(last)
    candidates: dict[str, ExpertStack] = {}
    others: dict[str, str] = {}
    for owner, names in owners.items():
        module: Any = model.get_submodule(owner)
        reason = _problem(module, names)
        for last in names:
            if reason is None:
                count, *sides = cast(tuple[int, int, int], tuple(getattr(module, last).shape))
                rows, columns = sides[::-1] if module.is_transposed else sides
                candidates[f"{owner}.{last}"] = ExpertStack((count, rows, columns), bool(module.is_transposed))
            else:
                others[f"{owner}.{last}"] = reason
    return ExpertStacks(candidates, others)


def stack_names(module: Any) -> list[str]:
    """The parameters of an experts module that are stacks: the first projection and the last."""
    return ["gate_up_proj" if module.has_gate else "up_proj", LAST]


def _problem(module: Any, names: list[str]) -> str | None:
    """The reason why an experts module cannot be quantized; None if it can."""
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate")):
        return f"{type(module).__name__} computes them in its own way"
    if names != stack_names(module):
        return f"{type(module).__name__} has the parameters {', '.join(names)}"
    return None
