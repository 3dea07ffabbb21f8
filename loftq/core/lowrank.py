"""Rank-r factors of a residual E (out, in): the best approximation in the Frobenius norm, found cheaply.

The residual of rounding has a flat spectrum, so a single randomized pass captures too little of it
(Halko, Martinsson, Tropp, arXiv 0909.4061, bound the loss by the decay of the spectrum). Block Krylov
iteration (Musco and Musco, arXiv 1504.05477) converges in a few passes over E, fewer still from the factors
of the residual one alternation earlier. Plain subspace iteration, one step from the same start, was tried:
it follows the moving residual too slowly, and five alternations end 0.5 to 1.3 % above exact ones.

With U orthonormal, `U Uᵀ E` is the best approximation of E in the span of U, and

    ‖E − U Uᵀ E‖² = ‖E‖² − ‖Uᵀ E‖²,

so the error after the factors needs no second pass over E. The published procedure is `exact`, a full SVD.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_SMALL = 128  # a side up to which all of the spectrum costs little
_NARROWEST = 8  # columns of a Krylov block: fewer cost as much, since reading E is what takes the time


@dataclass(frozen=True)
class Factors:
    """`left @ right` approximates E: left (out, k) orthonormal (or zero), right (k, in) = leftᵀ E, by falling norm."""

    left: torch.Tensor
    right: torch.Tensor
    singular_values: torch.Tensor  # (k,) float64: the norms of right's rows

    def captured(self, rank: int) -> float:
        """The part of ‖E‖² that the first `rank` directions hold."""
        return float(self.singular_values[:rank].square().sum())

    def adapter(self, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, in) and B (out, rank) with `scaling * B @ A = left @ right`, the norm shared evenly."""
        values = self.singular_values[:rank]
        inverse_root = torch.where(values > 0, values.rsqrt(), 0).to(self.left.dtype)  # exact zeros stay zero
        root = values.sqrt().to(self.left.dtype)
        share = scaling**-0.5
        a = self.right[:rank] * (share * inverse_root).unsqueeze(1)
        b = self.left[:, :rank] * (share * root)
        return a.contiguous(), b.contiguous()


def exact(residual: torch.Tensor, rank: int) -> Factors:
    """The published step: a full SVD, of which `rank` directions are kept."""
    u, s, vh = torch.linalg.svd(residual, full_matrices=False)
    s = s[:rank]
    return Factors(u[:, :rank], s.unsqueeze(1) * vh[:rank], s.double())


def gram(residual: torch.Tensor, rank: int) -> Factors:
    """All of the spectrum through the Gram matrix of the smaller side: cheap where that side is small.

    Squaring loses singular values below about 1e-4 of the largest, whose share of ‖E‖² float32 cannot show.
    """
    out_features, in_features = residual.shape
    if out_features <= in_features:
        _, vectors = torch.linalg.eigh((residual @ residual.T).double())
        left = vectors[:, -rank:].to(residual.dtype)
    else:
        _, vectors = torch.linalg.eigh((residual.T @ residual).double())
        left, _ = torch.linalg.qr(residual @ vectors[:, -rank:].to(residual.dtype))
    return _leading(left, left.T @ residual, rank)


def krylov(residual: torch.Tensor, start: torch.Tensor, depth: int) -> Factors:
    """The best approximation of as many columns as `start` within span[K, (EEᵀ)K, …, (EEᵀ)^(depth-1) K], K = E · start.

    Reads E twice a step. `start` is (in, b) with b * depth at most the smaller side of E.
    """
    width = start.shape[1]
    left = residual.new_empty(residual.shape[0], depth * width)
    right = residual.new_empty(depth * width, residual.shape[1])
    for step in range(depth):
        block = residual @ start  # (out, b)
        before = torch.linalg.vector_norm(block, dim=0)
        basis = left[:, : step * width]
        for _ in range(2):  # twice is enough: the basis stays orthogonal to working precision
            block -= basis @ (basis.T @ block)
        block, triangle = torch.linalg.qr(block)
        # Where E has fewer directions than the Krylov space, what is left of a column is noise, and QR fills it
        # with a direction that the basis may hold already. Counted twice, it would claim energy that E lacks.
        new = triangle.diagonal().abs() > 1e-5 * before
        span = slice(step * width, (step + 1) * width)
        left[:, span] = block * new
        start = torch.mm(left[:, span].T, residual, out=right[span]).T  # (in, b)
    return _leading(left, right, width)


def factorize(
    residual: torch.Tensor, rank: int, depth: int, previous: Factors | None, generator: torch.Generator
) -> Factors:
    """The leading `rank` factors, from `previous` ones or from Gaussian columns drawn on the CPU.

    Where the smaller side is small, or `depth` Krylov blocks would span half of it, all of the spectrum costs no more.
    """
    width = max(rank, _NARROWEST)
    if min(residual.shape) <= max(_SMALL, 2 * depth * width):
        return gram(residual, rank)
    if previous is not None and previous.right.shape[0] >= width:
        start = previous.right[:width].T
    else:
        start = torch.randn(residual.shape[1], width, generator=generator).to(residual.device)
    return krylov(residual, start, depth)


def _leading(left: torch.Tensor, right: torch.Tensor, count: int) -> Factors:
    """The leading singular directions of E within an orthonormal basis `left`, where right = leftᵀ E."""
    energy, vectors = torch.linalg.eigh((right @ right.T).double())
    turn = vectors[:, -count:].flip(1).to(left.dtype)  # eigh's order is rising
    return Factors(left @ turn, turn.T @ right, energy[-count:].flip(0).clamp(min=0).sqrt())
