"""Warns when a backbone runs without the adapter that it is of no use without (`core.directions`).

The quantizers put the check before the first forward pass of a model, because an adapter is loaded after its backbone.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

TEXT = (
    "this backbone leaves out what its adapter adds, so it is of no use without it: load the adapter too "
    "(loftq.load_qlora, or adapter_kwargs={'subfolder': 'loftq_init'} in from_pretrained), or one that was trained "
    "from it. A new LoRA does not have what is missing"
)


class AdapterCheck:
    """A hook before the forward pass of a model. It looks once, and warns if no adapter adds anything."""

    def __init__(self) -> None:
        self.done = False

    def __call__(self, model: nn.Module, _inputs: Any) -> None:
        """Look, unless it has been done, or the model is being compiled."""
        if self.done or torch.compiler.is_compiling():
            return
        self.done = True
        if _is_quantized(model) and not _has_adapter(model):
            warnings.warn(TEXT, stacklevel=2)


def _is_quantized(model: nn.Module) -> bool:
    """Whether the model has packed weights still: after a merge it has none."""
    from loftq.models.packed_experts import PackedExperts
    from loftq.models.packed_linear import PackedLinear

    return any(isinstance(module, (PackedLinear, PackedExperts)) for module in model.modules())


def _has_adapter(model: nn.Module) -> bool:
    """Whether a factor B of any LoRA differs from zero, or is not to be seen here, as where processes share it out."""
    factors = (parameter for name, parameter in model.named_parameters() if ".lora_B." in name)
    return any(factor.is_meta or not factor.numel() or bool(factor.any()) for factor in factors)
