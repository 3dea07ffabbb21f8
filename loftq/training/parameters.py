"""How many parameters a model has, and how many of them train."""

from __future__ import annotations

from torch import nn


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Those that train, and all: of quantized linears the weights that their codes stand for."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
        own = dict(module.named_parameters(recurse=False))
        if not isinstance(rows, int) or not isinstance(columns, int) or list(module.children()):
            continue
        weight = own.get("weight")
        if weight is None or weight.shape != (rows, columns):
            total += rows * columns - (0 if weight is None else weight.numel())
    return trainable, total
