"""Quantizes a weight that gets no adapter.

Without data, each weight goes to the nearest level under its group's own range.

With H, the mean of x xᵀ of the inputs, the scales are searched (`scale_search`) and the codes come from error feedback
(GPTQ, `rounding`). Then, by turns, the scales are fitted to the codes by least squares in the metric of H
(`regression`), and the codes are improved under them by coordinate descent. No turn makes the error of the outputs
larger, and the last one that makes it clearly smaller is returned.
"""

from __future__ import annotations

import torch

from loftq.core.affine import AffineQuantizer
from loftq.core.metric import damped
from loftq.core.rounding import feedback, output_squared_norm
from loftq.core.scale_search import search
from loftq.core.scales import Solved
from loftq.core.solvers.calibrated import left_by
from loftq.core.solvers.pooled_calibrated import fit_scales_and_codes
from loftq.core.solvers.solution import scales_times, unit_of

TURNS = 4
_ENOUGH = 0.999  # a turn that leaves more than this part of the squared error is the last one


def round_weight(weight: torch.Tensor, quantizer: AffineQuantizer, moment: torch.Tensor | None = None) -> Solved:
    """Codes and scales of `weight` (out, in), float32 and finite, whose inputs have the mean `moment` of x xᵀ.

    Without a moment, weights are rounded to the nearest.
    """
    unit = unit_of(weight)
    if unit != 1:
        codes, scales = round_weight(weight / unit, quantizer.in_unit(unit), moment)
        return codes, scales_times(scales, unit)
    if moment is None:
        return quantizer.quantize(weight)
    h = damped(moment.to(weight.device))
    scales = search(weight, quantizer, h.diagonal().float())
    solved = feedback(weight, quantizer, scales, h), scales
    residual = left_by(solved, weight, quantizer)
    least = output_squared_norm(residual, h)
    for _ in range(TURNS):
        again = fit_scales_and_codes(weight, residual, quantizer, solved, h)
        residual = left_by(again, weight, quantizer)
        error = output_squared_norm(residual, h)
        if not error < least:
            break
        enough = error > _ENOUGH * least
        solved, least = again, error
        if enough:
            break
    return solved
