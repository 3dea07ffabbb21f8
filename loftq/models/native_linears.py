"""Linears of our own layout: built from what a solver found, and weights as `PackedLinear` reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from loftq.core.grid import Grid
from loftq.core.solvers.solution import Solution
from loftq.formats import native
from loftq.models.packed_linear import PackedLinear


def read_weight(module: str, shape: Sequence[int], grid: Grid, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The weight that the stored tensors of a linear or an expert stand for: float32 (out, in)."""

    def stored(name: str) -> torch.Tensor:
        return read(native.stored_name(module, shape, name.removeprefix(".")))

    return PackedLinear.load("", shape[-2:], grid, stored).dequantize()


def linear_classes() -> tuple[type[nn.Module], ...]:
    """The class that the plug-in puts in the place of dense linears."""
    return (PackedLinear,)


def build(linear: nn.Linear, grid: Grid, solution: Solution, compute_dtype: torch.dtype | None) -> PackedLinear:
    """The linear that takes the place of a dense one."""
    return PackedLinear.replacing(linear, grid, solution, compute_dtype)
