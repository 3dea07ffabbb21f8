"""Initialization of a QA-LoRA adapter (arXiv 2309.14717) without data. The algebra of pools is in `loftq.core.pooled`.

A shift of a whole group commutes with a min/max quantizer whose zero-points float, so LoftQ's alternation would change
nothing; a least-squares fit helps instead. For given codes, the scale and shift of a group that minimize ‖W − W~‖ are a
linear regression. Rounding under them, and fitting again, never increases the error. Afterwards the error has no part
that is constant in a group, which an adapter could correct: B = 0.

If zero-points are whole numbers, only scales are fitted. The best adapter for the error E that remains has the closed
form C = SVD_r(mean_pool(E)), and is computed by turns with the rounding.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from loftq.core import lowrank
from loftq.core.affine import FLOATING, AffineQuantizer
from loftq.core.pooled import factor, spread
from loftq.core.scales import Scales
from loftq.core.solvers.loftq import lora_start, norm
from loftq.core.solvers.solution import Solution, Trace, settled, times, unit_of
from loftq.errors import OptionError

_ENOUGH = 1 - 1e-6  # the fit stops after a round that leaves more than this part of the error


def solve_pooled(
    weight: torch.Tensor,
    quantizer: AffineQuantizer,
    rank: int,
    iterations: int,
    scaling: float,
    pool: int,
    *,
    seed: int = 0,
) -> Solution:
    """Quantize `weight` (out, in), float32 and finite, with a QA-LoRA adapter A (rank, in / pool), B (out, rank).

    `iterations` limits the rounds of fitting, and the turns with the adapter; 0 means plain rounding. Raises
    OptionError for a rank above the smaller side of (out, in / pool).
    """
    rows, pools = check_rank(weight, rank, pool)
    unit = unit_of(weight)
    if unit != 1:
        quantizer = quantizer.in_unit(unit)
        return times(solve_pooled(weight / unit, quantizer, rank, iterations, scaling, pool, seed=seed), unit)
    generator = torch.Generator().manual_seed(seed)
    work = torch.empty_like(weight)
    scales = quantizer.scales(weight)
    plain = quantizer.residual(weight, None, work, scales)
    best, refit = _fit(weight, quantizer, scales, plain, work, iterations)
    start = lora_start(weight.new_empty(rows, pools), rank, generator)
    trace = Trace(norm(weight, quantizer), math.sqrt(plain), (), 0, math.sqrt(refit))
    if iterations == 0 or quantizer.zero_point in FLOATING:
        return Solution(quantizer.encode(weight, best), best, *start, trace)

    factors: lowrank.Factors | None = None
    solution = (quantizer.encode(weight, best), best, *start)
    errors: list[float] = []
    best_iteration = 0
    for t in range(1, iterations + 1):
        shift = None if factors is None else spread(factors.left[:, :rank] @ factors.right[:rank], pool)
        target = weight if shift is None else weight - shift
        if shift is not None:
            before = quantizer.residual(target, None, work, best)
            best, _ = _fit(target, quantizer, best, before, work, 1)
        squared = quantizer.residual(weight, shift, work, best)
        means = work.view(rows, pools, pool).mean(dim=2)  # (out, L)
        factors = lowrank.exact(means, rank)
        errors.append(math.sqrt(lowrank.rest(squared, work, factors, rank, pool)))
        if errors[-1] < min([trace.final, *errors[:-1]]):
            a, b = factors.adapter(rank, scaling * factor(weight.shape[1], pool))
            solution, best_iteration = (quantizer.encode(target, best), best, a, b), t
    trace = replace(trace, iterations=tuple(errors), kept=best_iteration)
    return settled(Solution(*solution, trace), weight, quantizer, scaling, pool)


def check_rank(weight: torch.Tensor, rank: int, pool: int) -> tuple[int, int]:
    """Numbers of outputs and of pools of a weight. Raises OptionError for a rank above the smaller of the two."""
    rows, pools = weight.shape[0], weight.shape[1] // pool
    if not 0 < rank <= min(rows, pools):
        raise OptionError(f"rank {rank} is outside 1..{min(rows, pools)}, the smaller side of {rows} x {pools} pools")
    return rows, pools


def _fit(
    weight: torch.Tensor, quantizer: AffineQuantizer, scales: Scales, squared: float, work: torch.Tensor, rounds: int
) -> tuple[Scales, float]:
    """The best scales after at most `rounds` rounds of fitting and rounding, and the squared error that they leave."""
    best, least = scales, squared
    for _ in range(rounds):
        scales = quantizer.refit(weight, scales)
        squared = quantizer.residual(weight, None, work, scales)
        enough = squared >= least * _ENOUGH
        if squared < least:
            best, least = scales, squared
        if enough:
            break
    return best, least
