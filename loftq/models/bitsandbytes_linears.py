"""bitsandbytes' linears: built from what a solver found, and weights as bitsandbytes itself reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from loftq.core.grid import Grid
from loftq.core.solvers.solution import Solution
from loftq.formats import bitsandbytes as layout

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt


def read_weight(module: str, shape: Sequence[int], grid: Grid, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The weight that the stored tensors of a linear stand for: float32 (out, in)."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant

    names = [spec.name for spec in layout.specs(module, shape, grid, torch.float32)]
    codes, *others = (read(name) for name in names)
    weight: torch.Tensor
    if grid.bits == 8:
        weight = int8_vectorwise_dequant(codes, others[0])
        return weight
    stored = {name.removeprefix(f"{names[0]}."): part for name, part in zip(names[1:], others, strict=True)}
    state = QuantState.from_dict(stored, codes.device)
    state.dtype = torch.float32  # rather than rounded to the compute dtype
    weight = dequantize_4bit(codes, state)
    return weight


def linear_classes() -> tuple[type[nn.Module], ...]:
    """The classes that transformers puts in the place of dense linears."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return (Linear4bit, Linear8bitLt)


def build(
    linear: nn.Linear, grid: Grid, solution: Solution, compute_dtype: torch.dtype | None
) -> Linear4bit | Linear8bitLt:
    """The linear that takes the place of a dense one."""
    if grid.bits == 8:
        return _linear8bit(linear, grid, solution)
    return _linear4bit(linear, grid, solution, compute_dtype)


def _linear8bit(linear: nn.Linear, grid: Grid, solution: Solution) -> Linear8bitLt:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    shape = tuple(linear.weight.shape)
    packed = layout.tensors("", shape, grid, linear.weight.dtype, solution.codes, solution.scales)
    with torch.device("meta"):
        quantized = Linear8bitLt(
            linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=6.0
        )
    device = linear.weight.device
    quantized.weight = Int8Params(packed[".weight"], requires_grad=False, SCB=packed[".SCB"]).to(device)
    quantized.bias = linear.bias
    return quantized.train(linear.training)


def _linear4bit(linear: nn.Linear, grid: Grid, solution: Solution, compute_dtype: torch.dtype | None) -> Linear4bit:
    from bitsandbytes.nn import Linear4bit, Params4bit

    dtype = compute_dtype or linear.weight.dtype
    shape = tuple(linear.weight.shape)
    packed = layout.tensors("", shape, grid, dtype, solution.codes, solution.scales)
    stored = {name.removeprefix(".weight").lstrip("."): tensor for name, tensor in packed.items()}
    with torch.device("meta"):
        quantized = Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, dtype, quant_type=grid.codebook
        )
    weight = stored.pop("")
    quantized.weight = Params4bit.from_prequantized(weight, stored, device=linear.weight.device, module=quantized)
    quantized.bias = linear.bias
    return quantized.train(linear.training)
