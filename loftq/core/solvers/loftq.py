"""The alternation: finds a quantized backbone Q and factors A, B whose sum is near a weight W.

LoftQ (arXiv 2310.08659, Algorithm 1) minimizes ‖W − Q − s·B·A‖_F by turns, from A₀ = B₀ = 0:

    Q_t = quant(W − s·B_{t−1}·A_{t−1}),        s·B_t·A_t = SVD_r(W − Q_t).

The scaling s with which the adapter will run is folded into the factors (B = U√Σ/√s, A = √Σ·Vᵀ/√s). The original
code does not do this, so that with s ≠ 1 its adapter does not apply the correction that was computed. The error may
rise from one turn to the next, so the best iterate is returned, with its own Q, A and B, and the whole trace is
recorded. T = 0 is QLoRA's initialization: Q = quant(W), B = 0, and A drawn as `torch.nn.Linear` draws its weights.

Besides W, the loop holds a single matrix of the same size. Codes are computed once, for the best iterate.
"""

from __future__ import annotations

import math

import torch

from loftq.core import lowrank
from loftq.core.grid import Quantizer
from loftq.core.kernels import blocks
from loftq.core.solvers.methods import SVD
from loftq.core.solvers.solution import Solution, Trace, settled, times, unit_of
from loftq.errors import OptionError, UnknownNameError

_DEPTH_COLD = 10  # Krylov steps of the first factorization, which starts from noise
_DEPTH_WARM = 3  # Krylov steps of the others, which start from the one before; a single step loses up to 1.6 %


def solve_loftq(
    weight: torch.Tensor,
    quantizer: Quantizer,
    rank: int,
    iterations: int,
    scaling: float,
    *,
    svd: str = "krylov",
    seed: int = 0,
) -> Solution:
    """Quantize `weight` (out, in), float32 and finite, with an adapter of rank `rank` that will run with `scaling`.

    `seed` determines the random start of the factors (and A for `iterations=0`). With `rank=0` there is no adapter.
    Raises OptionError for a rank above the smaller side, for iterations below 0, and for a scaling that is not above 0.
    """
    if svd not in SVD:
        raise UnknownNameError("svd", svd, SVD)
    check_solvable(weight, rank, iterations, scaling)
    unit = unit_of(weight)
    if unit != 1:
        quantizer = quantizer.in_unit(unit)
        return times(solve_loftq(weight / unit, quantizer, rank, iterations, scaling, svd=svd, seed=seed), unit)
    generator = torch.Generator().manual_seed(seed)
    work = torch.empty_like(weight)
    plain = quantizer.residual(weight, None, work)
    if iterations == 0 or rank == 0:
        codes, scales = quantizer.quantize(weight)
        a, b = lora_start(weight, rank, generator)
        return Solution(codes, scales, a, b, Trace(norm(weight, quantizer), math.sqrt(plain), (), 0))

    def factorize(previous: lowrank.Factors | None) -> lowrank.Factors:
        if svd == "exact":
            return lowrank.exact(work, rank)
        depth = _DEPTH_COLD if previous is None else _DEPTH_WARM
        return lowrank.factorize(work, rank, depth, previous, generator)

    factors = factorize(None)
    errors = [_rest(plain, work, factors, rank)]
    best_iteration, best = 1, factors
    parent: lowrank.Factors | None = None
    for t in range(2, iterations + 1):
        previous = factors
        squared = quantizer.residual(weight, _product(previous, rank, work), work)
        factors = factorize(previous)
        errors.append(_rest(squared, work, factors, rank))
        if errors[-1] < errors[best_iteration - 1]:
            best_iteration, parent, best = t, previous, factors

    target = weight if parent is None else torch.sub(weight, _product(parent, rank, work), out=work)
    codes, scales = quantizer.quantize(target)
    a, b = best.adapter(rank, scaling)
    trace = Trace(norm(weight, quantizer), math.sqrt(plain), tuple(errors), best_iteration)
    return settled(Solution(codes, scales, a, b, trace), weight, quantizer, scaling)


def check_solvable(weight: torch.Tensor, rank: int, iterations: int, scaling: float) -> None:
    """Raise OptionError for a rank, a number of iterations or a scaling that is invalid for a weight."""
    if not 0 <= rank <= min(weight.shape):
        raise OptionError(f"rank {rank} is outside 0..{min(weight.shape)}, the smaller side of {tuple(weight.shape)}")
    if iterations < 0:
        raise OptionError(f"iterations must be 0 or more, not {iterations}")
    if not (math.isfinite(scaling) and scaling > 0):
        raise OptionError(f"the adapter's scaling must be above 0, not {scaling}")


def _product(factors: lowrank.Factors, rank: int, out: torch.Tensor) -> torch.Tensor:
    return torch.mm(factors.left[:, :rank], factors.right[:rank], out=out)


def _rest(squared: float, residual: torch.Tensor, factors: lowrank.Factors, rank: int) -> float:
    return math.sqrt(lowrank.rest(squared, residual, factors, rank))


def norm(weight: torch.Tensor, quantizer: Quantizer) -> float:
    """The norm ‖W‖ of a weight, summed block by block."""
    if weight.device.type == "cpu":
        return math.sqrt(blocks.squared_norm(weight, quantizer.block_size))
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64))


def lora_start(weight: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random A and zero B, which add nothing to a weight (out, in)."""
    bound = weight.shape[1] ** -0.5  # kaiming_uniform_(a=√5), as peft and torch.nn.Linear draw it
    a = (torch.rand(rank, weight.shape[1], generator=generator) * 2 - 1) * bound
    return a.to(weight.device), torch.zeros(weight.shape[0], rank, device=weight.device)
