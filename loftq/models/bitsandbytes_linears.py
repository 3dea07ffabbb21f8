"""Puts quantized linears in the place of dense ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from loftq.core.grid import Grid
from loftq.core.solvers.loftq import Solution
from loftq.formats import bitsandbytes, native

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    from loftq.models.packed_linear import PackedLinear


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, under every name that it goes by."""
    for name in [name for name, module in model.named_modules(remove_duplicate=False) if module is old]:
        model.set_submodule(name, new)


def quantized_linear(
    format: str, linear: nn.Linear, grid: Grid, solution: Solution, compute_dtype: torch.dtype | None
) -> Linear4bit | Linear8bitLt | PackedLinear:
    """The linear that takes the place of a dense one."""
    if format != "bitsandbytes":
        return _packed_linear(linear, grid, solution, compute_dtype)
    if grid.bits == 8:
        return _linear8bit(linear, grid, solution)
    return _linear4bit(linear, grid, solution, compute_dtype)


def _linear8bit(linear: nn.Linear, grid: Grid, solution: Solution) -> Linear8bitLt:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    shape = tuple(linear.weight.shape)
    packed = bitsandbytes.tensors("", shape, grid, linear.weight.dtype, solution.codes, solution.scales)
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
    packed = bitsandbytes.tensors("", shape, grid, dtype, solution.codes, solution.scales)
    stored = {name.removeprefix(".weight").lstrip("."): tensor for name, tensor in packed.items()}
    with torch.device("meta"):
        quantized = Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, dtype, quant_type="nf4"
        )
    weight = stored.pop("")
    quantized.weight = Params4bit.from_prequantized(weight, stored, device=linear.weight.device, module=quantized)
    quantized.bias = linear.bias
    return quantized.train(linear.training)


def _packed_linear(
    linear: nn.Linear, grid: Grid, solution: Solution, compute_dtype: torch.dtype | None
) -> PackedLinear:
    from loftq.models.packed_linear import PackedLinear

    packed = PackedLinear(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        grid=grid,
        dtype=compute_dtype or linear.weight.dtype,
        device=linear.weight.device,
    )
    shape = tuple(linear.weight.shape)
    stored = native.tensors("", shape, grid, linear.weight.dtype, solution.codes, solution.scales)
    for name, tensor in stored.items():
        getattr(packed, name.lstrip(".")).data.copy_(tensor)
    packed.bias = linear.bias
    return packed.train(linear.training)
