"""Measures of the residual of a weight: its own norm, or the error that it causes in a layer's outputs.

With x the inputs of a layer and H = E[x xᵀ] (in, in), the mean squared error per token that a residual E (out, in)
causes in the outputs is

    ‖E‖_H² = tr(E H Eᵀ) = ‖E R‖²,      H = R Rᵀ.

So the best factors of rank r in this metric are those of E R, times R⁻¹:  B A = SVD_r(E R) R⁻¹  (QERA, arXiv
2410.06040, theorem 1; CLoQ, arXiv 2501.18475, section 3.2). With the leading left singular vectors U of E R this is
U Uᵀ E, which needs no R⁻¹. Every such root gives the same product; a triangular root from Cholesky is the cheapest,
since half of the arithmetic of E R is with zeros, and left out. The diagonal metric, R = diag(√E[x²]), is QERA's
approximation, and the identity is LoftQ's metric.

H is damped to H + 0.01 · mean(diag H) · I and decomposed in float64. Without damping it would be singular if there are
fewer tokens than inputs, or if an input is always zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch

from loftq.core.kernels import dispatch
from loftq.errors import OptionError

DAMPING = 0.01
_PARTS, _NARROWEST, _WIDEST = 8, 128, 512  # into how many parts a triangular root is cut, and of what widths
_USUAL = 60  # exponents of two up to which the mean of H's diagonal is used as it is
METRICS = {
    "identity": "the weight itself",
    "diagonal": "the outputs, if inputs were uncorrelated",
    "full": "the outputs",
}


def damped(moment: torch.Tensor) -> torch.Tensor:
    """H (in, in) with a part of its mean diagonal added to the diagonal: float64, positive definite.

    If H is so large or small that float32 cannot hold its products, it is divided by a power of four. Errors of outputs
    are used as parts of the outputs' norm, which that does not change. Raises OptionError for NaN and Inf.
    """
    exact = moment.double()
    mean = float(exact.diagonal().mean())
    if not math.isfinite(float(exact.sum())):
        raise OptionError("the second moment of a layer's inputs holds NaN or Inf: calibrate on another text")
    _, exponent = math.frexp(mean)
    if mean > 0 and abs(exponent) > _USUAL:
        exact, mean = exact * 4.0 ** -(exponent // 2), mean * 4.0 ** -(exponent // 2)
    elif exact is moment:
        exact = moment.clone()
    exact.diagonal().add_(DAMPING * mean or 1.0)
    return exact


@dataclass(frozen=True)
class Metric:
    """A root R of H: None for the identity, float64 (in,) for a diagonal, and otherwise lower triangular (in, in).

    An `upper` root is upper triangular, and may have more columns than rows: (in, in + r).
    """

    root: torch.Tensor | None = None
    upper: bool = False

    @classmethod
    def of(cls, kind: str, moment: torch.Tensor | None) -> Metric:
        """The metric with a name in `METRICS` for a damped second moment (in, in), which the identity does not need."""
        if kind == "identity" or moment is None:
            return cls()
        if kind == "diagonal":
            return cls(moment.double().diagonal().sqrt())
        return cls(torch.linalg.cholesky(moment.double()))

    def whiten(self, residual: torch.Tensor) -> torch.Tensor:
        """The product E R of a residual and the root: float32 (out, in), or as many columns as R has."""
        if self.root is None:
            return residual
        root = self._root_as(residual.dtype)
        if root.dim() == 1:
            return residual * root
        spans = self._spans()
        if not self.upper:
            return torch.cat([residual[:, span.start :] @ root[span.start :, span] for span in spans], dim=1)
        spans[-1] = slice(spans[-1].start, root.shape[1])
        return torch.cat([residual[:, : span.stop] @ root[: span.stop, span] for span in spans], dim=1)

    def pulls(self, whitened: torch.Tensor) -> torch.Tensor:
        """The product E H of a residual, from E R: half the gradient of its squared norm."""
        if self.root is None:
            return whitened
        root = self._root_as(whitened.dtype)
        if root.dim() == 1:
            return whitened * root
        spans = self._spans()
        if not self.upper:
            return torch.cat([whitened[:, : span.stop] @ root[span, : span.stop].T for span in spans], dim=1)
        return torch.cat([whitened[:, span.start :] @ root[span, span.start :].T for span in spans], dim=1)

    def _spans(self) -> list[slice]:
        """Parts of the rows of a triangular root, such that few zeros are multiplied."""
        size = len(cast(torch.Tensor, self.root))
        step = min(max(size // _PARTS, _NARROWEST), _WIDEST)
        return [slice(first, min(first + step, size)) for first in range(0, size, step)]

    def _root_as(self, dtype: torch.dtype) -> torch.Tensor:
        return self._single if dtype == torch.float32 else cast(torch.Tensor, self.root).to(dtype)

    @cached_property
    def _single(self) -> torch.Tensor:
        return cast(torch.Tensor, self.root).float()

    def unwhiten(self, right: torch.Tensor) -> torch.Tensor:
        """The product F R⁻¹ of a matrix F (r, in) and the inverse of a root that is not upper, in the dtype of F."""
        if self.root is None:
            return right
        exact = right.double()
        if self.root.dim() == 1:
            product = exact / self.root
        else:
            product = torch.linalg.solve_triangular(self.root, exact, upper=False, left=False)
        return product.to(right.dtype)

    def norm(self, residual: torch.Tensor) -> float:
        """The norm ‖E‖_H of a residual."""
        return math.sqrt(squared(self.whiten(residual)))


def squared(matrix: torch.Tensor) -> float:
    """The squared Frobenius norm, with the norms of rows in float32 and their sum in float64.

    If float32 cannot hold the squares, all of it is computed in float64.
    """
    usual = float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())
    if 1e-20 < usual < 1e36:
        return usual
    step = max(dispatch.CHUNK // max(matrix.shape[1], 1), 1)
    return sum(float(rows.double().square().sum()) for rows in torch.split(matrix, step))
