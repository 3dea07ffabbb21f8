"""Initialization of a QA-LoRA adapter for a layer whose inputs are known, with the least error in the layer's outputs.

This is `pooled` in the metric of H (`metric`). Codes come from error feedback. Then, by turns, scales and floating
zero-points are fitted jointly to the codes (`regression`), and codes are improved under them by coordinate descent. An
adapter can only add shifts of whole groups, so with floating zero-points nothing remains for it to do: B = 0.

If zero-points are whole numbers, the best adapter has a closed form too. Among all corrections C (out, L) that are
constant in a pool, the best one is C*:

    C* = E H Sᵀ H_g⁻¹,    H_g = S H Sᵀ,    ‖E − C S‖_H² = ‖E − C* S‖_H² + ‖C − C*‖²_{H_g},

where S (L, in) sums over pools. So the best one of rank r is C = SVD_r(C* R_g) R_g⁻¹, R_g R_gᵀ = H_g.
"""

from __future__ import annotations

import torch

from loftq.core import lowrank
from loftq.core.affine import FLOATING, AffineQuantizer, AffineWeight
from loftq.core.metric import Metric, damped
from loftq.core.pooled import factor, spread
from loftq.core.regression import fit, pooled_fit
from loftq.core.rounding import descend, output_squared_norm
from loftq.core.scales import Solved
from loftq.core.solvers.calibrated import ROUNDS, Norms, first_rounding, left_by, norms, trace_of
from loftq.core.solvers.loftq import lora_start
from loftq.core.solvers.methods import Method
from loftq.core.solvers.pooled import check_rank
from loftq.core.solvers.solution import Solution, settled, times, unit_of

_ENOUGH = 1 - 1e-4  # iteration stops after a round that leaves more than this part of the error


def solve_pooled_calibrated(
    weight: torch.Tensor,
    quantizer: AffineQuantizer,
    method: Method,
    moment: torch.Tensor,
    rank: int,
    iterations: int,
    scaling: float,
    pool: int,
    *,
    seed: int = 0,
) -> Solution:
    """Quantize `weight` (out, in), float32 and finite, whose inputs have the mean `moment` of x xᵀ (in, in).

    The adapter has A (rank, in / pool) and B (out, rank). `iterations` limits the number of rounds; with 0, the first
    scales are used and the adapter adds nothing. Raises OptionError for a rank above the smaller side of
    (out, in / pool).
    """
    rows, pools = check_rank(weight, rank, pool)
    unit = unit_of(weight)
    if unit != 1:
        problem = (weight / unit, quantizer.in_unit(unit), method, moment, rank, iterations, scaling, pool)
        return times(solve_pooled_calibrated(*problem, seed=seed), unit)
    h = damped(moment.to(weight.device))
    outputs = Metric.of("full", h)
    generator = torch.Generator().manual_seed(seed)
    plain = left_by(quantizer.quantize(weight), weight, quantizer)
    solved = first_rounding(weight, quantizer, method, h)
    residual = left_by(solved, weight, quantizer)
    rounded = [norms(error, outputs) for error in (weight, plain, residual)]
    a, b = lora_start(weight.new_empty(rows, pools), rank, generator)
    best, best_iteration, least = solved, 0, rounded[2][1]
    errors: list[Norms] = []
    shift: torch.Tensor | None = None
    for t in range(1, iterations + 1):
        target = weight if shift is None else weight - shift
        solved = fit_scales_and_codes(target, residual, quantizer, solved, h)
        residual = left_by(solved, weight, quantizer)
        if quantizer.zero_point not in FLOATING:
            exact, sums = pooled_fit(residual, h, pool)
            metric = Metric.of("full", sums)
            factors = lowrank.exact(metric.whiten(exact), rank)
            shift = spread((factors.left @ metric.unwhiten(factors.right)).float(), pool)
            residual = residual - shift
        errors.append(norms(residual, outputs))
        enough = errors[-1][1] > least * _ENOUGH
        if errors[-1][1] < least:
            best, best_iteration, least = solved, t, errors[-1][1]
            if shift is not None:
                a, b = factors.adapter(rank, scaling * factor(weight.shape[1], pool))
                a, b = metric.unwhiten(a).float(), b.float()
        if enough:
            break
    solution = Solution(*best, a, b, trace_of(rounded, errors, best_iteration))
    return settled(solution, weight, quantizer, scaling, pool, outputs.root)


def fit_scales_and_codes(
    target: torch.Tensor, residual: torch.Tensor, quantizer: AffineQuantizer, solved: Solved, moment: torch.Tensor
) -> Solved:
    """Fit scales and zero-points to the codes, then improve the codes under them.

    `residual` is the error of `solved`. Scales and zero-points that do not reduce it are not used.
    """
    codes, scales = solved
    levels = AffineWeight.of(codes, scales, target.shape, quantizer.bits).codes.float() - 2 ** (quantizer.bits - 1)
    shifted = quantizer.zero_point in FLOATING
    if scales.zeros is not None:
        levels -= spread(scales.zeros.view(len(target), -1).float() - 2 ** (quantizer.bits - 1), quantizer.block_size)
    slopes, shifts = fit(target, levels, moment, quantizer.block_size, shifted=shifted)
    refitted = quantizer.fitted(slopes.view(-1), shifts.view(-1) if shifted else None, scales)
    refitted_error = output_squared_norm(left_by((codes, refitted), target, quantizer), moment)
    if refitted_error < output_squared_norm(residual, moment):
        scales = refitted
    return descend(target, quantizer, scales, codes, moment, ROUNDS), scales
