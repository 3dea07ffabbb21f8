"""Finds the language model inside a model that also reads images or sound."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from loftq.models.tasks import CAUSAL


def language_part(model: nn.Module, task: str, linears: Collection[str]) -> str | None:
    """The name of the language model in a model, or None for a model that is one as a whole.

    It is the smallest part that holds the embeddings of the tokens and any of `linears`, the modules to choose from.
    """
    config: Any = model.config
    if task not in CAUSAL or config.get_text_config() is config:
        return None
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    name = next((name for name, module in model.named_modules() if module is embeddings), "")
    while name := name.rpartition(".")[0]:
        within = sum(linear.startswith(f"{name}.") for linear in linears)
        if within:
            return name if within < len(linears) else None
    return None


def part_outside(name: str, part: str) -> str | None:
    """The largest module that holds a parameter and not the language model `part`; None if it lies in the latter."""
    if name.startswith(f"{part}."):
        return None
    pieces, others = name.split("."), part.split(".")
    common = next((at for at, (one, other) in enumerate(zip(pieces, others, strict=False)) if one != other), 0)
    return ".".join(pieces[: common + 1])
