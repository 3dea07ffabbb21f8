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
    return _rotate(left, left.T @ residual)


def krylov(residual: torch.Tensor, start: torch.Tensor, depth: int) -> Factors:
    """The best approximation within span[K, (EEᵀ)K, …, (EEᵀ)^(depth-1) K], K = E · start.

    Reads E twice a step. `start` is (in, b) with b * depth at most the smaller side of E.
    """
    lefts: list[torch.Tensor] = []
    rights: list[torch.Tensor] = []
    for _ in range(depth):
        block = residual @ start  # (out, b)
        for _ in range(2):  # twice is enough: the basis stays orthogonal to working precision
            for left in lefts:
                block -= left @ (left.T @ block)
        block, _ = torch.linalg.qr(block)
        right = block.T @ residual  # (b, in)
        lefts.append(block)
        rights.append(right)
        start = right.T
    return _rotate(*_whiten(torch.cat(lefts, dim=1), torch.cat(rights)))


def factorize(
    residual: torch.Tensor, rank: int, depth: int, previous: Factors | None, generator: torch.Generator
) -> Factors:
    """The leading `rank` factors, from `previous` ones or from Gaussian columns drawn on the CPU.

    Where `depth` Krylov blocks would span half of the smaller side, the whole spectrum costs no more.
    """
    width = max(rank, _NARROWEST)
    if 2 * depth * width >= min(residual.shape):
        return gram(residual, rank)
    if previous is not None and previous.right.shape[0] >= width:
        start = previous.right[:width].T
    else:
        start = torch.randn(residual.shape[1], width, generator=generator).to(residual.device)
    factors = krylov(residual, start, depth)
    return Factors(factors.left[:, :width], factors.right[:width], factors.singular_values[:width])


def _whiten(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a nearly orthonormal basis orthonormal, and zero the directions that it holds twice.

    Where E has fewer directions than the Krylov space, the last blocks are noise or exact zeros, and QR fills
    them with directions that are in the basis already: counted twice, they would claim energy that E lacks.
    """
    overlap, vectors = torch.linalg.eigh((left.T @ left).double())
    inverse_root = torch.where(overlap > 0.5, overlap.clamp(min=0.5).rsqrt(), 0)
    turn = (vectors * inverse_root).to(left.dtype)
    return left @ turn, turn.T @ right


def _rotate(left: torch.Tensor, right: torch.Tensor) -> Factors:
    """Align an orthonormal basis with the singular directions of E inside it."""
    gram = (right @ right.T).double()  # (b, b)
    values, vectors = torch.linalg.eigh(gram)
    order = torch.arange(len(values) - 1, -1, -1, device=values.device)
    vectors = vectors[:, order].to(left.dtype)
    return Factors(left @ vectors, vectors.T @ right, values[order].clamp(min=0).sqrt())
