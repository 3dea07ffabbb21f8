"""Rank-r factors of a residual E (out, in): its best approximation in the Frobenius norm, at a low cost.

The residual of rounding has a flat spectrum, so a single randomized pass captures too little of it
(Halko, Martinsson, Tropp, arXiv 0909.4061, bound the loss by the decay of the spectrum). Block Krylov
iteration (Musco and Musco, arXiv 1504.05477) converges in a few passes over E, and in fewer if it starts from
the factors of the previous alternation. Plain subspace iteration, one step from the same start, was tried:
it follows the changing residual too slowly, and five alternations end with an error 0.5 to 1.3 % above the exact one.

With U orthonormal, `U Uᵀ E` is the best approximation of E in the span of U, and

    ‖E − U Uᵀ E‖² = ‖E‖² − ‖Uᵀ E‖²,

so computing the error that the factors leave needs no second pass over E, unless it is so small that the difference has
lost its digits (`rest`). The published procedure is `exact`, a full SVD.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from loftq.core.error import CANCELLED
from loftq.core.kernels import dispatch
from loftq.core.pooled import spread

_LARGE = 20  # exponent of two up to which a block is multiplied as it is
_SMALL = 128  # length of a side up to which the whole spectrum costs little
_NOISE = 1e-6  # part of the largest energy: float32 products leave errors of this size in smaller ones
_REST = 1e-5  # part of a column: a smaller rest of it is noise
_NARROWEST = 8  # least columns of a Krylov block: fewer cost as much, since most of the time goes into reading E


@dataclass(frozen=True)
class Factors:
    """`left @ right` approximates E: left (out, k) orthonormal (or zero), right (k, in) = leftᵀ E.

    Directions are sorted by falling singular value.
    """

    left: torch.Tensor
    right: torch.Tensor
    singular_values: torch.Tensor  # (k,) float64: the norms of right's rows

    def captured(self, rank: int) -> float:
        """The part of ‖E‖² that lies in the first `rank` directions."""
        return float(self.singular_values[:rank].square().sum())

    def adapter(self, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, in) and B (out, rank), of equal norms, with `scaling * B @ A = left @ right`."""
        values = self.singular_values[:rank]
        usable = values > torch.finfo(torch.float32).tiny  # others would overflow; their part of E is not visible
        inverse_root = torch.where(usable, values.rsqrt(), 0).to(self.left.dtype)
        root = values.sqrt().to(self.left.dtype)
        share = scaling**-0.5
        a = self.right[:rank] * (share * inverse_root).unsqueeze(1)
        b = self.left[:, :rank] * (share * root)
        return a.contiguous(), b.contiguous()


def exact(residual: torch.Tensor, rank: int) -> Factors:
    """The leading `rank` factors by a full SVD, as published."""
    u, s, vh = torch.linalg.svd(residual, full_matrices=False)
    s = s[:rank]
    return Factors(u[:, :rank], s.unsqueeze(1) * vh[:rank], s.double())


def gram(residual: torch.Tensor, rank: int) -> Factors:
    """The leading `rank` factors by way of the Gram matrix of the smaller side, which is cheap if that side is small.

    Squaring loses singular values below about 1e-4 of the largest; float32 cannot represent their share of ‖E‖².
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
    """The best b factors of E within span[K, (EEᵀ)K, …, (EEᵀ)^(depth-1) K], where K = E · start.

    Each step reads E twice. `start` is (in, b) with b * depth at most the smaller side of E.
    """
    width = start.shape[1]
    left = residual.new_empty(residual.shape[0], depth * width)
    right = residual.new_empty(depth * width, residual.shape[1])
    count = 0  # columns of the basis
    for _ in range(depth):
        block = residual @ _moderate(start)  # (out, b)
        before = torch.linalg.vector_norm(block, dim=0)
        basis = left[:, :count]
        for _ in range(2):  # twice is enough: the basis stays orthogonal to working precision
            block -= basis @ (basis.T @ block)
        # If E has fewer directions than the Krylov space, the rest of a column is noise, and QR replaces it by a
        # direction that the basis may already hold. Counted twice, it would add energy that E does not have.
        own = torch.linalg.vector_norm(block, dim=0) > _REST * before
        block, triangle = torch.linalg.qr(block[:, own])
        block = block[:, triangle.diagonal().abs() > _REST * before[own]]
        if not block.shape[1]:
            break
        span = slice(count, count + block.shape[1])
        left[:, span], count = block, span.stop
        start = torch.mm(block.T, residual, out=right[span]).T  # (in, b)
    used = max(count, width)
    left[:, count:used], right[count:used] = 0, 0
    return _leading(left[:, :used], right[:used], width)


def _moderate(start: torch.Tensor) -> torch.Tensor:
    """A matrix divided by a power of two if it is so large that float32 cannot hold the squares of its products."""
    _, exponent = math.frexp(float(start.abs().max()))
    return start * 2.0**-exponent if exponent > _LARGE else start


def factorize(
    residual: torch.Tensor, rank: int, depth: int, previous: Factors | None, generator: torch.Generator
) -> Factors:
    """The leading `rank` factors. The iteration starts from `previous` ones, or from Gaussian columns drawn on the CPU.

    If the smaller side is small, or `depth` Krylov blocks would span half of it, the whole spectrum costs no more, and
    is computed instead.
    """
    width = max(rank, _NARROWEST)
    if min(residual.shape) <= max(_SMALL, 2 * depth * width):
        return gram(residual, rank)
    if previous is not None and previous.right.shape[0] >= width:
        start = previous.right[:width].T
    else:
        start = torch.randn(residual.shape[1], width, generator=generator).to(residual.device)
    return krylov(residual, start, depth)


def rest(squared: float, residual: torch.Tensor, factors: Factors, rank: int, pool: int = 1) -> float:
    """‖E‖² without what the first `rank` factors take of it, where `squared` is ‖E‖² of the `residual` (out, in).

    With a `pool`, the factors are those of the means over pools of so many columns.
    """
    difference = squared - pool * factors.captured(rank)
    if difference >= CANCELLED * squared:
        return difference
    total = 0.0
    step = max(dispatch.CHUNK // residual.shape[1], 1)
    for first in range(0, len(residual), step):
        rows = slice(first, first + step)
        product = factors.left[rows, :rank].double() @ factors.right[:rank].double()
        total += float((residual[rows].double() - spread(product, pool)).square().sum())
    return total


def _leading(left: torch.Tensor, right: torch.Tensor, count: int) -> Factors:
    """The leading singular directions of E within an orthonormal basis `left`, where right = leftᵀ E."""
    energy, vectors = torch.linalg.eigh((right @ right.T).double())
    turn = vectors[:, -count:].flip(1).to(left.dtype)  # eigh sorts in rising order
    energy = energy[-count:].flip(0).clamp(min=0)
    rotated = turn.T @ right
    noisy = energy <= _NOISE * energy[0]
    if bool(noisy.any()):
        energy = torch.where(noisy, rotated.double().square().sum(dim=1), energy)
    return Factors(left @ turn, rotated, energy.sqrt())
