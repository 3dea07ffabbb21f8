"""QA-LoRA's start for a layer whose inputs are known: scales, zero-points and codes that err least in its outputs.

As `pooled`, in the metric of H (`metric`). Codes come from error feedback; then, by turns, scales and floating
zero-points are fitted jointly for the codes (`regression`), and the codes by coordinate descent for those. A shift of a
whole group is what the adapter could add, so that with floating zero-points nothing is left for it: B = 0.

Where zero-points are whole numbers, what the adapter does best has a closed form too. Of all corrections C (out, L)
that are constant in a pool,

    C* = E H Sᵀ H_g⁻¹,    H_g = S H Sᵀ,    ‖E − C S‖_H² = ‖E − C* S‖_H² + ‖C − C*‖²_{H_g},

with S (L, in) the sums over pools, so the best of rank r is C = SVD_r(C* R_g) R_g⁻¹, R_g R_gᵀ = H_g.
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
from loftq.core.solvers.loftq import Solution, lora_start
from loftq.core.solvers.methods import Method
from loftq.core.solvers.pooled import check_rank

_ENOUGH = 1 - 1e-4  # a round that leaves more of the error than this is the last


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

    The adapter has A (rank, in / pool) and B (out, rank). `iterations` bounds the rounds; with 0 scales stay as they
    are first found, and the adapter adds nothing. Raises OptionError for a rank above the smaller side of
    (out, in / pool).
    """
    rows, pools = check_rank(weight, rank, pool)
    h = damped(moment.to(weight.device))
    outputs = Metric.of("full", h)
    generator = torch.Generator().manual_seed(seed)
    plain = left_by(quantizer.quantize(weight), weight, quantizer)
    solved = first_rounding(weight, quantizer, method, h)
    left = left_by(solved, weight, quantizer)
    rounded = [norms(error, outputs) for error in (weight, plain, left)]
    a, b = lora_start(weight.new_empty(rows, pools), rank, generator)
    best, kept, least = solved, 0, rounded[2][1]
    errors: list[Norms] = []
    shift: torch.Tensor | None = None
    for t in range(1, iterations + 1):
        target = weight if shift is None else weight - shift
        solved = _fitted(target, left, quantizer, solved, h)
        left = left_by(solved, weight, quantizer)
        if quantizer.zero_point not in FLOATING:
            exact, sums = pooled_fit(left, h, pool)
            metric = Metric.of("full", sums)
            factors = lowrank.exact(metric.whiten(exact), rank)
            shift = spread((factors.left @ metric.unwhiten(factors.right)).float(), pool)
            left = left - shift
        errors.append(norms(left, outputs))
        enough = errors[-1][1] > least * _ENOUGH
        if errors[-1][1] < least:
            best, kept, least = solved, t, errors[-1][1]
            if shift is not None:
                a, b = factors.adapter(rank, scaling * factor(weight.shape[1], pool))
                a, b = metric.unwhiten(a).float(), b.float()
        if enough:
            break
    return Solution(*best, a, b, trace_of(rounded, errors, kept))


def _fitted(
    target: torch.Tensor, left: torch.Tensor, quantizer: AffineQuantizer, solved: Solved, moment: torch.Tensor
) -> Solved:
    """Scales and zero-points for the codes, then codes for those; as they were where that is no nearer.

    `left` is what `solved` leaves of the target.
    """
    codes, scales = solved
    levels = AffineWeight.of(codes, scales, target.shape, quantizer.bits).codes.float() - 2 ** (quantizer.bits - 1)
    shifted = quantizer.zero_point in FLOATING
    if scales.zeros is not None:
        levels -= spread(scales.zeros.view(len(target), -1).float() - 2 ** (quantizer.bits - 1), quantizer.block_size)
    slopes, shifts = fit(target, levels, moment, quantizer.block_size, shifted=shifted)
    refitted = quantizer.fitted(slopes.view(-1), shifts.view(-1) if shifted else None, scales)
    if output_squared_norm(left_by((codes, refitted), target, quantizer), moment) < output_squared_norm(left, moment):
        scales = refitted
    return descend(target, quantizer, scales, codes, moment, ROUNDS), scales
