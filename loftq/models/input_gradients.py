"""Makes the inputs of a model require gradients, so that gradient checkpointing works with frozen embeddings."""

from __future__ import annotations

from typing import Any

from torch import nn


def require_input_gradients(model: Any) -> None:
    """Call transformers' method for it, then replace its hooks, local functions, by one that can be pickled."""
    model.enable_input_require_grads()
    module: nn.Module
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "make_inputs_require_grads":
                module._forward_hooks[key] = _require_gradient


def _require_gradient(_module: nn.Module, _inputs: Any, output: Any) -> None:
    first = output[0] if isinstance(output, tuple) else output  # BEiT's embeddings also return the size of the image
    first.requires_grad_(True)
