"""How the residual of a weight is measured: by itself, or by what it does to a layer's outputs.

With x the inputs of a layer and H = E[x xᵀ] (in, in), the squared error of the outputs that a residual E (out, in)
leaves is, a token,

    ‖E‖_H² = tr(E H Eᵀ) = ‖E R‖²,      H = R Rᵀ.

So the best factors of rank r in this metric are those of E R, taken back:  B A = SVD_r(E R) R⁻¹  (QERA, arXiv
2410.06040, theorem 1; CLoQ, arXiv 2501.18475, section 3.2). Any such root gives the same product; the triangular one of
Cholesky is the cheapest. The diagonal metric, R = diag(√E[x²]), is QERA's approximate one, and the identity LoftQ's.

H is damped, H + 0.01 · mean(diag H) · I, and decomposed in float64: fewer tokens than inputs, or an input that is
always zero, leave it singular otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

DAMPING = 0.01
METRICS = {
    "identity": "the weight itself",
    "diagonal": "outputs, were inputs uncorrelated",
    "full": "outputs",
}


def damped(moment: torch.Tensor) -> torch.Tensor:
    """H (in, in) with a part of its mean diagonal added: float64, positive definite."""
    exact = moment.double()
    mean = float(exact.diagonal().mean())
    return exact + torch.eye(len(exact), dtype=torch.float64, device=exact.device) * (DAMPING * mean or 1.0)


@dataclass(frozen=True)
class Metric:
    """A root R of H: None for the identity, float64 (in,) for a diagonal, (in, in) lower triangular otherwise."""

    root: torch.Tensor | None = None

    @classmethod
    def of(cls, kind: str, moment: torch.Tensor | None) -> Metric:
        """The metric of a name of `METRICS` for a second moment (in, in), damped, that the identity does without."""
        if kind == "identity" or moment is None:
            return cls()
        if kind == "diagonal":
            return cls(moment.double().diagonal().sqrt())
        return cls(torch.linalg.cholesky(moment.double()))

    def whiten(self, residual: torch.Tensor) -> torch.Tensor:
        """E R, float32 (out, in)."""
        if self.root is None:
            return residual
        root = self.root.to(residual.dtype)
        return residual * root if root.dim() == 1 else residual @ root

    def unwhiten(self, right: torch.Tensor) -> torch.Tensor:
        """F R⁻¹ of F (r, in), in its own dtype."""
        if self.root is None:
            return right
        exact = right.double()
        if self.root.dim() == 1:
            found = exact / self.root
        else:
            found = torch.linalg.solve_triangular(self.root, exact, upper=False, left=False)
        return found.to(right.dtype)

    def norm(self, residual: torch.Tensor) -> float:
        """‖E‖_H."""
        return math.sqrt(squared(self.whiten(residual)))


def squared(matrix: torch.Tensor) -> float:
    """‖E‖²: rows in float32, their sum in float64."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())
