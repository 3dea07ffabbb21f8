"""LoRA's second factor, whose products are scaled and added to the outputs of the linear in place.

peft makes up to three tensors as large as the outputs of a linear on the way to their sum, and scales the gradient once
more. On a CPU these passes over memory take a part of the time. Here the sum is made in one tensor:

    y = W x + s · B h,        ∂L/∂h = s · ∂L/∂y · B,        ∂L/∂B = s · (∂L/∂y)ᵀ h.

Outputs and gradients are those of peft to the last bit. Layers around bitsandbytes' 4-bit linears round the products
before the sum, and others after it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import bnb
from peft.tuners.lora import layer as lora
from torch import nn

from loftq.models.cheap_activations import computing_product
from loftq.models.first_factor import FirstFactor
from loftq.models.peft_layers import PackedLoraLinear


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, outputs: torch.Tensor, inner: torch.Tensor, weight: torch.Tensor, scaling: float, rounds_first: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(inner, weight)
        ctx.scaling = scaling
        products = nn.functional.linear(inner, weight)
        if scaling != 1:
            products.mul_(scaling)
        if rounds_first:
            products = products.to(outputs.dtype)
        return products.add_(outputs).to(outputs.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        inner, weight = ctx.saved_tensors
        scaled = grad.to(weight.dtype)
        if ctx.scaling != 1:
            scaled = scaled * ctx.scaling
        rows = scaled.reshape(-1, scaled.shape[-1])
        of_weight = rows.t() @ inner.reshape(-1, inner.shape[-1])
        return grad, scaled @ weight, of_weight, None, None


class _AddsInPlace:
    """The forward pass of a layer with a single plain adapter. Everything else is left to peft."""

    _rounds_first = False

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = self._plain_adapter(x) if not (args or kwargs) else None
        if name is None:
            found: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return found
        return computing_product(partial(self._sum, name), x)

    def _sum(self: Any, name: str, x: torch.Tensor) -> torch.Tensor:
        outputs = self.base_layer(x)
        inner, weight = self.lora_A[name](x), self.lora_B[name].weight
        total: torch.Tensor = _Sum.apply(outputs, inner, weight, self.scaling[name], self._rounds_first)  # type: ignore[no-untyped-call]
        return total

    def _plain_adapter(self: Any, x: torch.Tensor) -> str | None:
        kind, active = x.device.type, self.active_adapters
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if autocast or self.disable_adapters or self.merged or len(active) != 1 or active[0] not in self.lora_A:
            return None
        name: str = active[0]
        factors = self.lora_A[name], self.lora_B[name]
        plain = type(factors[0]) is FirstFactor and type(factors[1]) is nn.Linear and factors[1].bias is None
        return name if plain and factors[0].weight.dtype == factors[1].weight.dtype else None


class _Linear(_AddsInPlace, lora.Linear):  # type: ignore[misc]
    pass


class _PackedLinear(_AddsInPlace, PackedLoraLinear):
    pass


class _Linear4bit(_AddsInPlace, bnb.Linear4bit):  # type: ignore[misc]
    _rounds_first = True


_CLASSES: dict[type, type] = {lora.Linear: _Linear, PackedLoraLinear: _PackedLinear, bnb.Linear4bit: _Linear4bit}


def add_in_place(model: nn.Module) -> None:
    """Let the layers whose inputs are kept once (`keep_inputs_once`) add their products in place, except on a GPU."""
    module: Any
    for module in model.modules():
        factors = list(module.lora_A.values()) if type(module) in _CLASSES else []
        if factors and all(type(f) is FirstFactor and f.weight.device.type in ("cpu", "meta") for f in factors):
            module.__class__ = _CLASSES[type(module)]
