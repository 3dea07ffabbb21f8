"""What training changed of an adapter, as an adapter of its own.

A trained adapter A, B on a backbone Q began as A₀, B₀, which make up for the rounding: Q + s₀ B₀ A₀ ≈ W. On W itself,

    ΔW = s B A − s₀ B₀ A₀ = [s B, −s₀ B₀] [A; A₀],

is a LoRA of rank r + r₀ with scaling 1. Its best approximation of a lower rank k is its truncated singular value
decomposition, by way of the QR factors of both sides, so that no matrix of W's size is decomposed.
"""

from __future__ import annotations

import torch

Factors = tuple[torch.Tensor, torch.Tensor]  # A (r, in) and B (out, r)


def change(trained: Factors, scaling: float, initial: Factors, initial_scaling: float) -> Factors:
    """A (r + r₀, in) and B (out, r + r₀) whose product is ΔW."""
    (a, b), (a0, b0) = trained, initial
    return torch.cat([a, a0]), torch.cat([scaling * b, -initial_scaling * b0], dim=1)


def truncated(factors: Factors, rank: int) -> tuple[Factors, float, float]:
    """The best factors of a lower rank, and the squared norms of what they leave of the product, and of the product."""
    a, b = (factor.double() for factor in factors)
    left, upper = torch.linalg.qr(b)  # (out, r), (r, r)
    right, lower = torch.linalg.qr(a.T)
    u, values, vh = torch.linalg.svd(upper @ lower.T)
    root = values[:rank].sqrt()
    kept = (root.unsqueeze(1) * (vh[:rank] @ right.T)).float(), (left @ u[:, :rank] * root).float()
    return kept, float(values[rank:].square().sum()), float(values.square().sum())
