"""LoRA's first factor on inputs of 16 bits, without copies of the inputs in float32 for the backward pass.

The factors train in float32. peft casts the inputs of every linear for them, and autograd keeps each copy, also where
several linears have the same input (q, k and v). Here autograd keeps the input itself, which is one tensor for all of
them, and the backward pass casts it again:

    h = x Aᵀ,        ∂L/∂A = (∂L/∂h)ᵀ x,        ∂L/∂x = ∂L/∂h · A.

Outputs and gradients are those of peft to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class FirstFactor(nn.Linear):
    """A factor A (rank, in) in float32, whose inputs may have 16 bits."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The products (…, rank) in float32."""
        kind = inputs.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if autocast or inputs.dtype == self.weight.dtype:
            return super().forward(inputs)
        products: torch.Tensor = _Products.apply(inputs, self.weight)  # type: ignore[no-untyped-call]
        return products


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        return nn.functional.linear(inputs.to(weight.dtype), weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        inputs, weight = ctx.saved_tensors
        of_inputs = (grad @ weight).to(inputs.dtype) if ctx.needs_input_grad[0] else None
        rows = inputs.reshape(-1, inputs.shape[-1]).to(weight.dtype)
        return of_inputs, grad.reshape(-1, grad.shape[-1]).t() @ rows


def keep_inputs_once(model: nn.Module) -> None:
    """Let the plain LoRA layers of a model keep their inputs as they are. Those with dropout stay as peft made them."""
    from peft.tuners.lora import LoraLayer  # importing it takes seconds, and a plan needs none of it

    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or layer.lora_variant or not layer.lora_A:
            continue
        factors = layer.lora_A.values()
        dropouts = layer.lora_dropout.values()
        if all(type(factor) is nn.Linear for factor in factors) and all(type(p) is nn.Identity for p in dropouts):
            for factor in factors:
                factor.__class__ = FirstFactor
            layer.cast_input_dtype_enabled = False
