"""The alternation in a metric: a backbone Q and factors A, B whose sum does to a layer's outputs what W does.

Minimized is ‖W − Q − s·B·A‖_H (`metric`), by turns. Given Q, the factors are closed:

    s·B·A = SVD_r((W − Q) R) R⁻¹,      H = R Rᵀ.

Given the factors, Q rounds T = W − s·B·A. Where rounding is to the nearest, anew each time, as LoftQ does. Where it is
by GPTQ's error feedback, or by feedback into the leading eigenvectors of H too, which the factors will hold, it is so
the first time, and then by coordinate descent on that grid, which never leaves more of ‖T − Q‖_H (CALDERA, arXiv
2405.18886, alternates likewise): neither half raises the error then. The best iterate is kept, with Q, A and B of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from loftq.core import lowrank
from loftq.core.grid import Quantizer
from loftq.core.metric import Metric, damped, squared
from loftq.core.rounding import descend, feedback
from loftq.core.scale_search import search
from loftq.core.scales import Scales, Solved
from loftq.core.solvers.loftq import Solution, Trace, check_solvable, lora_start
from loftq.core.solvers.methods import Method
from loftq.errors import OptionError

Norms = tuple[float, float]  # a norm of weights, and of outputs
_DEPTH = 10  # Krylov steps of a factorization; the steep spectrum of a whitened residual needs no more
ROUNDS = 2  # of coordinate descent an iteration


def solve_calibrated(
    weight: torch.Tensor,
    quantizer: Quantizer,
    method: Method,
    moment: torch.Tensor | None,
    rank: int,
    iterations: int,
    scaling: float,
    *,
    seed: int = 0,
) -> Solution:
    """Quantize `weight` (out, in), float32 and finite, whose inputs have the mean `moment` of x xᵀ (in, in).

    With `rank` or `iterations` 0 the adapter adds nothing. Raises OptionError for a rank above the smaller side, and
    for a method that needs a moment where there is none.
    """
    check_solvable(weight, rank, iterations, scaling)
    if moment is None and method.needs_moment:
        raise OptionError("rounding and metrics that know a layer's inputs need their second moment: calibrate first")
    generator = torch.Generator().manual_seed(seed)
    h = None if moment is None else damped(moment.to(weight.device))
    outputs = Metric.of("full", h)
    metric = outputs if method.metric == "full" else Metric.of(method.metric, h)
    directions = _directions(method, h, rank, generator) if iterations else None  # which an adapter corrects
    solved = first_rounding(weight, quantizer, method, h, directions)
    residual = left_by(solved, weight, quantizer)
    nearest = residual if method.plain else left_by(quantizer.quantize(weight), weight, quantizer)
    rounded = [norms(error, outputs) for error in (weight, nearest, residual)]
    del nearest

    a, b = lora_start(weight, rank, generator)
    best, kept, least = solved, 0, math.inf
    errors: list[Norms] = []
    product = torch.zeros_like(weight)
    for t in range(1, iterations + 1 if rank else 1):
        if t > 1:
            solved = _again(weight - product, quantizer, method, h, solved)
            residual = left_by(solved, weight, quantizer)
        whitened = metric.whiten(residual)
        factors = lowrank.factorize(whitened, rank, _DEPTH, None, generator)
        objective = math.sqrt(max(squared(whitened) - factors.captured(rank), 0.0))
        product = factors.left[:, :rank] @ metric.unwhiten(factors.right[:rank])
        residual = residual - product
        left = objective if metric is outputs else outputs.norm(residual)
        errors.append((math.sqrt(squared(residual)), left))
        if objective < least:
            best, kept, least = solved, t, objective
            a, b = factors.adapter(rank, scaling)
            a = metric.unwhiten(a)

    trace = trace_of(rounded, errors, kept)
    trace = replace(trace, outputs=trace.outputs if h is not None else None)
    return Solution(*best, a, b, trace.without_refit() if method.plain else trace)


def trace_of(rounded: Sequence[Norms], iterations: Sequence[Norms], kept: int) -> Trace:
    """The trace of norms: of the weight, of what plain rounding and the method's own leave of it, and of iterations."""
    traces = [
        Trace(weight, plain, tuple(pair[which] for pair in iterations), kept, refit)
        for which, (weight, plain, refit) in enumerate(zip(*rounded, strict=True))
    ]
    return replace(traces[0], outputs=traces[1])


def norms(error: torch.Tensor, outputs: Metric) -> Norms:
    """Of what is left of a weight, and of what that does to its outputs."""
    return math.sqrt(squared(error)), outputs.norm(error)


def left_by(solved: Solved, weight: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """W − Q."""
    return weight - quantizer.decode(*solved, weight.shape)


def first_rounding(
    weight: torch.Tensor,
    quantizer: Quantizer,
    method: Method,
    moment: torch.Tensor | None,
    directions: torch.Tensor | None = None,
) -> Solved:
    """Codes and scales of a weight by itself; `directions` (in, r) are those in which an adapter will correct it."""
    scales = _scales(weight, quantizer, method, moment)
    if moment is None or method.rounding == "nearest":
        return quantizer.encode(weight, scales), scales
    return feedback(weight, quantizer, scales, moment, directions), scales


def _again(
    target: torch.Tensor, quantizer: Quantizer, method: Method, moment: torch.Tensor | None, last: Solved
) -> Solved:
    """Codes and scales of a weight less the adapter's product."""
    if moment is None or method.rounding == "nearest":
        scales = _scales(target, quantizer, method, moment)
        return quantizer.encode(target, scales), scales
    codes, scales = last
    return descend(target, quantizer, scales, codes, moment, ROUNDS), scales


def _scales(target: torch.Tensor, quantizer: Quantizer, method: Method, moment: torch.Tensor | None) -> Scales:
    if method.scales == "absmax":
        return quantizer.scales(target)
    return search(target, quantizer, None if moment is None else moment.diagonal().float())


def _directions(
    method: Method, moment: torch.Tensor | None, rank: int, generator: torch.Generator
) -> torch.Tensor | None:
    """Where the inputs are largest: what a rank-r adapter in the metric mostly corrects, (in, rank)."""
    if moment is None or method.rounding != "intrinsic" or not rank:
        return None
    return lowrank.factorize(moment.float(), rank, _DEPTH, None, generator).left[:, :rank]
