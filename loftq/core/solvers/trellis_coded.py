"""The start of a trellis-coded weight: a backbone whose errors lie where an adapter, or later columns, repair them.

With text, H is the mean of x xᵀ, and V (in, r) its leading eigenvectors. By projected rounding, the backbone codes only
T = W − (W V) Vᵀ, and the adapter adds the rest (`core.directions`). Errors outside V cost tr(E S Eᵀ), where S is H
without what the adapter corrects (`core.rounding`). With S = U D Uᵀ, each column is coded for the sum of its own part
of T and the errors of those before it, and an error of column j then costs D_j. So columns get their bits by D_j and
their own size (`core.trellis`). The factors have a closed form, as in `solvers.calibrated`.

Without text, LoftQ's alternation is used: Q codes W − s·B·A, and A, B are the best factors of W − Q.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from loftq.core import lowrank, trellis
from loftq.core.directions import leading_directions, without_directions
from loftq.core.metric import Metric, damped, squared
from loftq.core.rounding import repayments
from loftq.core.solvers.calibrated import Norms, norms, trace_of
from loftq.core.solvers.loftq import check_solvable, lora_start
from loftq.core.solvers.methods import Method
from loftq.core.solvers.solution import Solution, settled, times, unit_of
from loftq.core.trellis import TrellisQuantizer, TrellisScales
from loftq.core.trellis_coding import encode

_DEPTH = 10  # Krylov steps of a factorization
Coded = tuple[torch.Tensor, TrellisScales]


def solve_trellis(
    weight: torch.Tensor,
    quantizer: TrellisQuantizer,
    method: Method,
    moment: torch.Tensor | None,
    rank: int,
    iterations: int,
    scaling: float,
    *,
    seed: int = 0,
) -> Solution:
    """Quantize `weight` (out, in), float32 and finite, whose inputs have the mean `moment` of x xᵀ (in, in).

    If `rank` or `iterations` is 0, the adapter adds nothing, and the backbone has all of the weight. The plain error of
    the trace is that of the coded matrix T, before the adapter. Raises OptionError for a rank above the smaller side.
    """
    check_solvable(weight, rank, iterations, scaling)
    unit = unit_of(weight)
    if unit != 1:
        solution = solve_trellis(weight / unit, quantizer, method, moment, rank, iterations, scaling, seed=seed)
        return times(solution, unit)
    generator = torch.Generator().manual_seed(seed)
    h = None if moment is None or not method.needs_moment else damped(moment.to(weight.device))
    metric = Metric.of("full", h)
    a, b = lora_start(weight, rank, generator)
    turns = iterations if rank else 0
    directions = None if h is None or not turns else leading_directions(h, rank, generator)
    coder = _Coder(weight, quantizer, h, directions)
    target = without_directions(weight, directions) if directions is not None and method.projects else weight
    coded = best = coder(target)
    decoded = quantizer.decode(*best, weight.shape)
    rounded = [norms(error, metric) for error in (weight, target - decoded, target - decoded)]
    errors: list[Norms] = []
    kept, least = 0, math.inf
    for turn in range(1, turns + 1):
        if turn > 1:
            coded = coder(target)
            decoded = quantizer.decode(*coded, weight.shape)
        residual = weight - decoded
        whitened = metric.whiten(residual)
        factors = lowrank.factorize(whitened, rank, _DEPTH, None, generator)
        objective = math.sqrt(lowrank.rest(squared(whitened), whitened, factors, rank))
        product = factors.left[:, :rank] @ metric.unwhiten(factors.right[:rank])
        errors.append((math.sqrt(squared(residual - product)), objective))
        target = weight - product
        if objective < least:
            best, kept, least = coded, turn, objective
            a, b = factors.adapter(rank, scaling)
            a = metric.unwhiten(a)
    trace = trace_of(rounded, errors, kept).without_refit()
    trace = replace(trace, outputs=trace.outputs if h is not None else None)
    return settled(Solution(*best, a, b, trace), weight, quantizer, scaling, root=metric.root)


class _Coder:
    """Codes matrices that take the place of a weight, all in the same metric."""

    def __init__(
        self,
        weight: torch.Tensor,
        quantizer: TrellisQuantizer,
        h: torch.Tensor | None,
        directions: torch.Tensor | None,
    ) -> None:
        self._bits, self._length = quantizer.bits, quantizer.length
        self._words = trellis.words_of(weight.shape, quantizer.bits, quantizer.length)
        self._feed: torch.Tensor | None = None
        self._costs: torch.Tensor | None = None
        if h is not None:
            self._feed, self._costs = repayments(h, directions)

    def __call__(self, target: torch.Tensor) -> Coded:
        """Codes and scales of `target` (out, in)."""
        rows = target.square().mean(dim=1).sqrt()
        relative = torch.where(rows > 0, target.T / rows, 0.0)
        costs = relative.square().mean(dim=1).double()  # of columns
        if self._costs is not None:
            costs *= self._costs
        widths = trellis.share(costs, self._bits)
        return encode(target, widths, rows, self._length, self._words, self._feed)
