"""The product with a weight that is stored packed: it is unpacked forward, and again backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

Part = tuple[slice, torch.Tensor]


class StoredWeight(Protocol):
    """The layout of a weight (rows, columns) in the tensors of its module."""

    def parts(self, dtype: torch.dtype, *stored: torch.Tensor | None) -> Iterator[Part]:
        """Unpack the weight in parts of whole rows, each with the slice of its rows."""


class _Matmul(torch.autograd.Function):
    """Computes x Wᵀ. W is unpacked in forward and again in backward, so that autograd keeps only the stored tensors."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layout: StoredWeight, *stored: torch.Tensor | None) -> torch.Tensor:
        ctx.layout = layout
        ctx.save_for_backward(*stored)
        products = [x @ weight.T for _, weight in layout.parts(x.dtype, *stored)]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        stored = ctx.saved_tensors
        parts = ctx.layout.parts(grad.dtype, *stored)
        rows, weight = next(parts)
        total = grad[..., rows] @ weight
        for rows, weight in parts:
            total += grad[..., rows] @ weight
        return (total, *[None] * (1 + len(stored)))


def product_with(layout: StoredWeight, x: torch.Tensor, *stored: torch.Tensor | None) -> torch.Tensor:
    """The product x Wᵀ with the weight that a layout reads from the stored tensors."""
    product: torch.Tensor = _Matmul.apply(x, layout, *stored)  # type: ignore[no-untyped-call]
    return product
