"""Factors for a backbone that is quantized already: only A and B are computed, and Q stays as it is.

With Q given there is nothing to alternate. The best factors have the closed form of `calibrated`,

    s·B·A = SVD_r((W − Q) R) R⁻¹,      H = R Rᵀ,

in the metric of the outputs, or with R = I in that of the weights.
"""

from __future__ import annotations

import math

import torch

from loftq.core import lowrank
from loftq.core.error import squared_error
from loftq.core.metric import Metric, damped, squared
from loftq.core.solvers.loftq import check_solvable, lora_start
from loftq.core.solvers.solution import Trace, unit_of

_DEPTH = 10  # Krylov steps


def fit_factors(
    weight: torch.Tensor,
    backbone: torch.Tensor,
    metric: str,
    moment: torch.Tensor | None,
    rank: int,
    scaling: float,
    *,
    svd: str = "krylov",
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, Trace]:
    """A (rank, in), B (out, rank) and the errors, for a weight W and a backbone Q (out, in), float32 and finite.

    `metric` is a name in `METRICS`, `moment` the mean of x xᵀ of the inputs (in, in), if it is known. Where Q is W, the
    adapter adds nothing, and its A is random. Raises OptionError for a rank above the smaller side.
    """
    check_solvable(weight, rank, 1, scaling)
    generator = torch.Generator().manual_seed(seed)
    h = None if moment is None else damped(moment.to(weight.device))
    outputs = Metric.of("full", h)
    chosen = Metric.of(metric, h)
    residual = weight - backbone
    unit = unit_of(residual)
    whitened = chosen.whiten(residual / unit)
    if not bool(residual.any()):
        a, b = lora_start(weight, rank, generator)
        kept = 0
    else:
        exact = svd == "exact"
        factors = lowrank.exact(whitened, rank) if exact else lowrank.factorize(whitened, rank, _DEPTH, None, generator)
        a, b = factors.adapter(rank, scaling)
        a, b, kept = chosen.unwhiten(a) * math.sqrt(unit), b * math.sqrt(unit), 1
    error = math.sqrt(squared_error(weight, backbone, (a, b), scaling))
    trace = Trace(math.sqrt(squared(weight)), math.sqrt(squared(residual)), (error,), kept)
    if h is None:
        return a, b, trace
    left = math.sqrt(squared_error(weight, backbone, (a, b), scaling, root=outputs.root))
    of_outputs = Trace(outputs.norm(weight), outputs.norm(residual), (left,), kept)
    return a, b, Trace(trace.weight, trace.plain, trace.iterations, kept, outputs=of_outputs)
