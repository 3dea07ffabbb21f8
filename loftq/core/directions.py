"""The directions in which a layer's inputs are largest, V (in, r): the leading eigenvectors of H, the mean of x xᵀ.

With the best B, an adapter of rank r adds any matrix of the form B Vᵀ. So it repairs all errors along V, and adds what
a backbone lacks along V. A backbone that codes only

    T = W − (W V) Vᵀ

has smaller values to round, and the adapter adds the rest, (W V) Vᵀ, at no cost. Such a backbone is of no use without
its adapter, since the inputs are largest where it is zero.
"""

from __future__ import annotations

import torch

from loftq.core import lowrank

_DEPTH = 10  # Krylov steps


def leading_directions(moment: torch.Tensor, rank: int, generator: torch.Generator) -> torch.Tensor:
    """The leading eigenvectors of H (in, in): (in, rank), float32, orthonormal up to rounding."""
    return lowrank.factorize(moment.float(), rank, _DEPTH, None, generator).left[:, :rank]


def without_directions(weight: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """The part T (out, in) of a weight that is orthogonal to `directions` (in, r), of which only the span matters."""
    basis: torch.Tensor = torch.linalg.qr(directions)[0]
    return weight - (weight @ basis) @ basis.T
