"""QA-LoRA (arXiv 2309.14717): an adapter on pooled inputs, which folds into the zero-points of a group-wise backbone.

With pools of p consecutive inputs, L = in / p of them, peft's forward adds

    s · (L · mean_pool(x)) Aᵀ Bᵀ,   A (r, L), B (out, r),   so   ΔW[o, i] = C[o, i div p],   C = s · (L / p) · B A.

(The paper's factor is 1, its authors' code has 1 / p: peft's L / p is the one that stock loaders apply.) ΔW is
constant within a pool. Where a pool is made of whole quantization groups with W~ = scale · level + shift,

    shift' = shift + C

is an exact merge: codes and scales stay. As a plain LoRA, the same adapter is A_full = (L / p) · A with each column
repeated p times.

Initialization. A shift of a whole group commutes with a min/max quantizer whose zero-points float, so alternating as
LoftQ does would change nothing; what helps is least squares. For given codes, the scale and shift of a group that
leave the least of ‖W − W~‖ are a regression; rounding again under them, and fitting again, never leaves more. No
group-constant part is left for the adapter then: B = 0. Where zero-points are whole numbers, scales alone are fitted,
and the best adapter for the rest E is, in closed form, C = SVD_r(mean_pool(E)): by turns with the rounding.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from loftq.core import lowrank
from loftq.core.affine import FLOATING, AffineQuantizer, AffineWeight
from loftq.core.scales import Scales
from loftq.core.solvers.loftq import Solution, Trace, lora_start, norm
from loftq.errors import OptionError

_ENOUGH = 1 - 1e-6  # a round that leaves more of the error than this is the last


def factor(columns: int, pool: int) -> float:
    """L / p: what peft's forward puts before B A, beside the scaling, for an input of `columns`."""
    return columns / pool / pool


def correction(a: torch.Tensor, b: torch.Tensor, scaling: float, pool: int) -> torch.Tensor:
    """C (out, L), what an adapter A (r, L), B (out, r) adds to the weights of each pool."""
    return scaling * factor(a.shape[1] * pool, pool) * (b @ a)


def spread(pooled: torch.Tensor, pool: int) -> torch.Tensor:
    """ΔW (out, in) of C (out, L)."""
    return pooled.repeat_interleave(pool, dim=1)


def delta(a: torch.Tensor, b: torch.Tensor, scaling: float, pool: int | None) -> torch.Tensor:
    """ΔW (out, in), what an adapter adds to a weight: on inputs pooled by `pool`, or a plain LoRA."""
    return scaling * (b @ a) if pool is None else spread(correction(a, b, scaling, pool), pool)


def plain_lora(a: torch.Tensor, pool: int) -> torch.Tensor:
    """The A (r, in) with which a plain LoRA of the same B and scaling computes the same as A (r, L) does pooled."""
    return spread(a * factor(a.shape[1] * pool, pool), pool)


def merge(weight: AffineWeight, pooled: torch.Tensor) -> AffineWeight:
    """The weight with C (out, L) in its shifts, codes and scales as they are. A pool must be whole groups."""
    return replace(weight, shifts=merge_shifts(weight.shifts, pooled))


def merge_shifts(shifts: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Shifts (out, groups) with C (out, L) in them."""
    groups, pools = shifts.shape[1], pooled.shape[1]
    if groups % pools:
        raise OptionError(f"{pools} pools are not made of whole groups, of which there are {groups}")
    return shifts + spread(pooled.to(shifts.dtype), groups // pools)


def solve(
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

    `iterations` bounds the rounds of fitting, and of turns with the adapter; 0 is plain rounding. Raises OptionError
    for a rank above the smaller side of (out, in / pool).
    """
    rows, pools = check_rank(weight, rank, pool)
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
    kept = (quantizer.encode(weight, best), best, *start)
    errors: list[float] = []
    at = 0
    for t in range(1, iterations + 1):
        shift = None if factors is None else spread(factors.left[:, :rank] @ factors.right[:rank], pool)
        target = weight if shift is None else weight - shift
        if shift is not None:
            left = quantizer.residual(target, None, work, best)
            best, _ = _fit(target, quantizer, best, left, work, 1)
        squared = quantizer.residual(weight, shift, work, best)
        means = work.view(rows, pools, pool).mean(dim=2)  # (out, L)
        factors = lowrank.exact(means, rank)
        errors.append(math.sqrt(max(squared - pool * factors.captured(rank), 0.0)))
        if errors[-1] < min([trace.final, *errors[:-1]]):
            a, b = factors.adapter(rank, scaling * factor(weight.shape[1], pool))
            kept, at = (quantizer.encode(target, best), best, a, b), t
    return Solution(*kept, replace(trace, iterations=tuple(errors), kept=at))


def check_rank(weight: torch.Tensor, rank: int, pool: int) -> tuple[int, int]:
    """Outputs and pools of a weight. Raises OptionError for a rank that they do not allow."""
    rows, pools = weight.shape[0], weight.shape[1] // pool
    if not 0 < rank <= min(rows, pools):
        raise OptionError(f"rank {rank} is outside 1..{min(rows, pools)}, the smaller side of {rows} x {pools} pools")
    return rows, pools


def _fit(
    weight: torch.Tensor, quantizer: AffineQuantizer, scales: Scales, squared: float, work: torch.Tensor, rounds: int
) -> tuple[Scales, float]:
    """The best scales of some rounds of fitting and rounding, and the squared error that they leave."""
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
