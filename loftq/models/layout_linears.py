"""The linears of each layout: built in memory, and read as those who load a folder read them.

A layout names its module of linears (`Layout.LINEARS`), which has all of `LayoutLinears`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import nn

from loftq.core.grid import Grid
from loftq.core.solvers.solution import Solution
from loftq.formats.layouts import LAYOUTS

Reader = Callable[[str], torch.Tensor]  # reads a tensor by its name


class LayoutLinears(Protocol):
    """The interface of a layout's module of linears."""

    def read_weight(self, module: str, shape: Sequence[int], grid: Grid, read: Reader, /) -> torch.Tensor:
        """The weight that the stored tensors of a linear stand for: float32 (out, in)."""

    def linear_classes(self) -> tuple[type[nn.Module], ...]:
        """The classes of quantized linears that its loaders put into a model."""

    def build(
        self, linear: nn.Linear, grid: Grid, solution: Solution, compute_dtype: torch.dtype | None, /
    ) -> nn.Module:
        """The linear that takes the place of a dense one. Only layouts that are IN_MEMORY have it."""


def linears_of(format: str) -> LayoutLinears:
    """The module of a layout's linears."""
    return cast(LayoutLinears, import_module(LAYOUTS[format].LINEARS))


def quantized_classes() -> tuple[type[nn.Module], ...]:
    """The classes of quantized linears of all layouts."""
    return tuple({kind for format in LAYOUTS for kind in linears_of(format).linear_classes()})


def read_weight(format: str, module: str, shape: Sequence[int], grid: Grid, read: Reader) -> torch.Tensor:
    """The weight that the stored tensors of a linear stand for, as its loaders read them: float32 (out, in)."""
    return linears_of(format).read_weight(module, shape, grid, read)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, under every name that it goes by."""
    for name in [name for name, module in model.named_modules(remove_duplicate=False) if module is old]:
        model.set_submodule(name, new)
