"""The alternation in a metric: finds a backbone Q and factors A, B whose sum gives a layer the outputs that W gives.

It minimizes ‖W − Q − s·B·A‖_H (`metric`) by turns. Given Q, the factors have a closed form:

    s·B·A = SVD_r((W − Q) R) R⁻¹ = U Uᵀ (W − Q),      H = R Rᵀ,      U the r leading left singular vectors of (W − Q) R.

Given the factors, Q is the rounding of T = W − s·B·A. A method that rounds to the nearest does so anew at each turn, as
LoftQ does. A method that rounds by GPTQ's error feedback (or by feedback that also uses the leading eigenvectors of H,
which the factors will correct) does so at the first turn only. Later turns use coordinate descent under the same
scales, which never increases ‖T − Q‖_H (CALDERA, arXiv 2405.18886, alternates in the same way), so that neither half of
a turn increases the error. The best iterate is returned, with its own Q, A and B.

By projected rounding, the first turn rounds only what the adapter leaves of W (`core.directions`). The squared error of
the outputs is then 5 to 13 % lower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from loftq.core import lowrank
from loftq.core.directions import leading_directions, without_directions
from loftq.core.grid import Quantizer
from loftq.core.metric import Metric, damped, squared
from loftq.core.rounding import descend, feed, repayments, repayments_of, rooted
from loftq.core.scale_search import search
from loftq.core.scales import Scales, Solved
from loftq.core.solvers.loftq import check_solvable, lora_start
from loftq.core.solvers.methods import Method
from loftq.core.solvers.solution import Solution, Trace, settled, times, unit_of
from loftq.errors import OptionError

Norms = tuple[float, float]  # the norm of an error in the weights, and in the outputs
_DEPTH = 10  # Krylov steps of a factorization; the steep spectrum of a whitened residual needs no more
_DEPTH_FED, _DEPTH_WARM = 5, 3  # the same for an error fed into the factors' directions, at the first turn and later
ROUNDS = 2  # passes of coordinate descent per iteration


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

    If `rank` or `iterations` is 0, the adapter adds nothing. Raises OptionError for a rank above the smaller side, and
    for a method that needs a moment if none is given.
    """
    check_solvable(weight, rank, iterations, scaling)
    unit = unit_of(weight)
    if unit != 1:
        problem = quantizer.in_unit(unit), method, moment, rank, iterations, scaling
        return times(solve_calibrated(weight / unit, *problem, seed=seed), unit)
    if moment is None and method.needs_moment:
        raise OptionError("this method needs the second moment of each layer's inputs: calibrate first")
    generator = torch.Generator().manual_seed(seed)
    h = None if moment is None else damped(moment.to(weight.device))
    directions = _directions(method, h, rank, generator) if iterations else None
    outputs, solved = _begun(weight, quantizer, method, h, directions)
    metric = outputs if method.metric == "full" else Metric.of(method.metric, h)
    residual = left_by(solved, weight, quantizer)
    whitened = metric.whiten(residual)
    refit = norms(residual, outputs) if metric is not outputs else (_norm(residual), _norm(whitened))
    plain = refit if method.plain else norms(left_by(quantizer.quantize(weight), weight, quantizer), outputs)
    rounded = [norms(weight, outputs), plain, refit]
    a, b = lora_start(weight, rank, generator)
    best, best_iteration, least = solved, 0, math.inf
    errors: list[Norms] = []
    product, pulls, factors = torch.zeros_like(weight), None, None
    for t in range(1, iterations + 1 if rank else 1):
        if t > 1:
            solved = _again(weight - product, quantizer, method, h, solved, pulls)
            residual = left_by(solved, weight, quantizer)
            whitened = metric.whiten(residual)
        depth = _DEPTH if directions is None else _DEPTH_FED if t == 1 else _DEPTH_WARM
        factors = lowrank.factorize(whitened, rank, depth, factors, generator)
        objective = math.sqrt(lowrank.rest(squared(whitened), whitened, factors, rank))
        right = factors.left[:, :rank].T @ residual
        product = factors.left[:, :rank] @ right
        residual = residual - product
        output_error = objective if metric is outputs else outputs.norm(residual)
        errors.append((_norm(residual), output_error))
        if objective < least:
            best, best_iteration, least = solved, t, objective
            a, b = replace(factors, right=right).adapter(rank, scaling)
        if t < iterations and metric is outputs and method.rounding != "nearest":
            pulls = outputs.pulls(whitened.addmm_(factors.left[:, :rank], factors.right[:rank], alpha=-1))

    trace = trace_of(rounded, errors, best_iteration)
    trace = trace if h is not None else replace(trace, outputs=None)
    solution = Solution(*best, a, b, trace.without_refit() if method.plain else trace)
    return settled(solution, weight, quantizer, scaling, root=outputs.root)


def _begun(
    weight: torch.Tensor,
    quantizer: Quantizer,
    method: Method,
    moment: torch.Tensor | None,
    directions: torch.Tensor | None,
) -> tuple[Metric, Solved]:
    """The metric of the outputs, and the first codes and scales, whose feedback comes from the same root of H."""
    if moment is None or method.rounding == "nearest":
        return Metric.of("full", moment), first_rounding(weight, quantizer, method, moment)
    target = without_directions(weight, directions) if directions is not None and method.projects else weight
    root = rooted(moment, directions)
    return Metric(root, upper=True), first_rounding(target, quantizer, method, moment, repayments_of(root)[0])


def trace_of(rounded: Sequence[Norms], iterations: Sequence[Norms], kept: int) -> Trace:
    """The trace of a solution whose iteration `kept` is returned (0 for none).

    `rounded` has the norms of the weight, of the error after plain rounding, and of the error after the method's own;
    `iterations` has those of the error after each iteration.
    """
    traces = [
        Trace(weight, plain, tuple(pair[which] for pair in iterations), kept, refit)
        for which, (weight, plain, refit) in enumerate(zip(*rounded, strict=True))
    ]
    return replace(traces[0], outputs=traces[1])


def norms(error: torch.Tensor, outputs: Metric) -> Norms:
    """The norms of a weight's error, and of the error that it causes in the outputs."""
    return _norm(error), outputs.norm(error)


def _norm(error: torch.Tensor) -> float:
    return math.sqrt(squared(error))


def left_by(solved: Solved, weight: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """The error W − Q that rounding leaves."""
    return weight - quantizer.decode(*solved, weight.shape)


def first_rounding(
    weight: torch.Tensor,
    quantizer: Quantizer,
    method: Method,
    moment: torch.Tensor | None,
    coefficients: torch.Tensor | None = None,
) -> Solved:
    """Codes and scales of a weight without an adapter. `coefficients` are those of feedback, if they are not H's."""
    scales = _scales(weight, quantizer, method, moment)
    if moment is None or method.rounding == "nearest":
        return quantizer.encode(weight, scales), scales
    if coefficients is None:
        coefficients, _ = repayments(moment)
    return feed(weight, quantizer, scales, coefficients), scales


def _again(
    target: torch.Tensor,
    quantizer: Quantizer,
    method: Method,
    moment: torch.Tensor | None,
    last: Solved,
    pulls: torch.Tensor | None,
) -> Solved:
    """Codes and scales of `target`, the weight minus the adapter's product, from those of the turn before.

    `pulls` are the error that these leave, times H, if it is known.
    """
    if moment is None or method.rounding == "nearest":
        scales = _scales(target, quantizer, method, moment)
        return quantizer.encode(target, scales), scales
    codes, scales = last
    return descend(target, quantizer, scales, codes, moment, ROUNDS, pulls), scales


def _scales(target: torch.Tensor, quantizer: Quantizer, method: Method, moment: torch.Tensor | None) -> Scales:
    if method.scales == "absmax":
        return quantizer.scales(target)
    return search(target, quantizer, None if moment is None else moment.diagonal().float())


def _directions(
    method: Method, moment: torch.Tensor | None, rank: int, generator: torch.Generator
) -> torch.Tensor | None:
    """The directions in which inputs are largest, (in, rank): a rank-r adapter in the metric corrects mostly these."""
    if moment is None or not method.knows_adapter or not rank:
        return None
    return leading_directions(moment, rank, generator)
