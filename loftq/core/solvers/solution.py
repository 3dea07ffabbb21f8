"""What a solver returns: codes, scales, factors, and the trace of the errors; and two steps that all solvers share.

Extreme weights are solved in a unit of their own. float32 holds numbers up to 3.4e38, but their squares only up to
1.8e19. A weight whose largest value is far from 1 is divided by a power of four before it is solved, and its scales and
factors are multiplied afterwards, which changes none of their digits. The quantizer knows the unit, because scales are
stored in the weight's own range (float16, 8 bits).

A small final error is computed again from the values that are stored (`error`), because the solvers' own errors are
differences of squared norms, or come from products in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from loftq.core.error import CANCELLED, squared_error
from loftq.core.grid import Decoder
from loftq.core.scales import Scales
from loftq.errors import OptionError

_USUAL = 40  # exponents of two up to which a weight is solved as it is
_HIGHEST = 30  # exponent of the largest value of a weight in its unit, so that values far below it stay above 0
_SMALL = 1e-5  # part of a weight's norm: float32 cannot show the digits of a smaller error


@dataclass(frozen=True)
class Trace:
    """Frobenius norms of a weight and of its errors. `iterations[t-1]` is ‖W − Q_t − s·B_t·A_t‖.

    `kept` is the iteration t that is returned, 0 if none is. `plain` is the error after rounding to the nearest under
    each block's own range, `refit` the error after the method's own rounding, if it has one. `outputs` are the same
    errors measured in the layer's outputs (`metric`), if its inputs are known.
    """

    weight: float
    plain: float
    iterations: tuple[float, ...]
    kept: int
    refit: float | None = None
    outputs: Trace | None = None

    @property
    def final(self) -> float:
        """The norm of the error that the returned solution leaves."""
        before = self.plain if self.refit is None else self.refit
        return self.iterations[self.kept - 1] if self.kept else before

    def without_refit(self) -> Trace:
        """The trace of a method that has no rounding of its own."""
        return replace(self, refit=None, outputs=self.outputs and replace(self.outputs, refit=None))


@dataclass(frozen=True)
class Solution:
    """Codes in the quantizer's form, their scales, A float32 (rank, in), B float32 (out, rank), and the trace."""

    codes: torch.Tensor
    scales: Scales
    a: torch.Tensor
    b: torch.Tensor
    trace: Trace


def trace_of_all(traces: Sequence[Trace], shares: Sequence[float] | None = None) -> Trace:
    """The trace of several weights together, such as the experts of a layer, each of which keeps its own iteration.

    An iteration's error is that of the best iterates until then, so that the last one is the final error. Errors of
    outputs are means over tokens, so each weight counts by its share of the tokens there.
    """
    total = sum(shares or ())
    if not shares or not total or any(trace.outputs is None for trace in traces):
        return _together(traces)
    roots = [math.sqrt(share / total) for share in shares]
    outputs = [_times(cast(Trace, trace.outputs), root) for trace, root in zip(traces, roots, strict=True)]
    return replace(_together(traces), outputs=_together(outputs))


def _together(traces: Sequence[Trace]) -> Trace:
    longest = max(len(trace.iterations) for trace in traces)
    rounds = [[_best(trace, t) for trace in traces] for t in range(1, longest + 1)]
    refits = [trace.refit for trace in traces if trace.refit is not None]
    return Trace(
        _root([trace.weight for trace in traces]),
        _root([trace.plain for trace in traces]),
        tuple(_root(errors) for errors in rounds),
        longest,
        _root(refits) if len(refits) == len(traces) else None,
    )


def _best(trace: Trace, iteration: int) -> float:
    if not trace.kept:
        return trace.final
    return trace.final if iteration >= trace.kept else min(trace.iterations[:iteration])


def _root(norms: Sequence[float]) -> float:
    return math.sqrt(sum(norm**2 for norm in norms))


def unit_of(weight: torch.Tensor) -> float:
    """The power of four by which a weight must be divided; 1 for any usual weight."""
    if weight.numel() == 0:
        return 1.0
    low, high = torch.aminmax(weight)
    largest = max(-float(low), float(high))
    if largest == 0 or not math.isfinite(largest):
        return 1.0
    _, exponent = math.frexp(largest)
    if abs(exponent) <= _USUAL:
        return 1.0
    return 4.0 ** ((exponent - _HIGHEST) // 2 if exponent > 0 else exponent // 2)


def times(solution: Solution, unit: float) -> Solution:
    """The solution of a weight from that of the weight divided by `unit`."""
    root = math.sqrt(unit) if solution.trace.kept else 1.0  # else the adapter adds nothing, and its A is random
    return replace(
        solution,
        scales=scales_times(solution.scales, unit),
        a=solution.a * root,
        b=solution.b * root,
        trace=_times(solution.trace, unit),
    )


def scales_times(scales: Scales, unit: float) -> Scales:
    """The scales of a weight from those of the weight divided by `unit`."""
    shifts = None if scales.shifts is None else scales.shifts * unit
    return replace(scales, values=scales.values * unit, shifts=shifts)


def _times(trace: Trace, unit: float) -> Trace:
    return Trace(
        trace.weight * unit,
        trace.plain * unit,
        tuple(error * unit for error in trace.iterations),
        trace.kept,
        None if trace.refit is None else trace.refit * unit,
        None if trace.outputs is None else _times(trace.outputs, unit),
    )


def settled(
    solution: Solution,
    weight: torch.Tensor,
    quantizer: Decoder,
    scaling: float,
    pool: int | None = None,
    root: torch.Tensor | None = None,
) -> Solution:
    """The solution with its final error computed again from its values, if that is small.

    `pool` is the size of a QA-LoRA's pools; `root` is that of the outputs' metric, if there is one.
    """
    trace = solution.trace
    if not trace.kept or not (_is_small(trace) or (trace.outputs and _is_small(trace.outputs))):
        return solution
    backbone = quantizer.decode(solution.codes, solution.scales, weight.shape)
    factors = (solution.a, solution.b)
    exact = _with_final(trace, squared_error(weight, backbone, factors, scaling, pool))
    if trace.outputs is not None:
        outputs = squared_error(weight, backbone, factors, scaling, pool, root)
        exact = replace(exact, outputs=_with_final(trace.outputs, outputs))
    return replace(solution, trace=exact)


def _is_small(trace: Trace) -> bool:
    before = trace.plain if trace.refit is None else trace.refit
    return trace.final**2 < CANCELLED * before**2 or trace.final < _SMALL * trace.weight


def _with_final(trace: Trace, squared: float) -> Trace:
    errors = list(trace.iterations)
    errors[trace.kept - 1] = math.sqrt(squared)
    return replace(trace, iterations=tuple(errors))


def check_solution(solution: Solution, quantizer: Decoder, name: str) -> None:
    """Raise OptionError if a part of the solution of the layer `name` is NaN or Inf, or can become so in a reader."""
    scales, trace = solution.scales, solution.trace
    reach = torch.stack([scales.values * float(level) + scales.offsets for level in quantizer.levels[[0, -1]]])
    parts = {
        "the factor A": solution.a,
        "the factor B": solution.b,
        "a scale": scales.values,
        "a zero-point": scales.offsets,
        "a quantized weight": reach,
    }
    odd = [part for part, tensor in parts.items() if not bool(torch.isfinite(tensor).all())]
    if not all(map(math.isfinite, [*_numbers(trace), *(_numbers(trace.outputs) if trace.outputs else ())])):
        odd.append("the error")
    if odd:
        raise unsolvable(name, f"{odd[0]} is NaN or Inf")


def unsolvable(name: str, reason: str) -> OptionError:
    """The error for a layer whose values are too extreme to be quantized."""
    return OptionError(
        f"{name} cannot be quantized ({reason}): check its weights, or leave it out "
        f"(--exclude-modules {name.rpartition('.')[2]})"
    )


def _numbers(trace: Trace) -> list[float]:
    return [trace.weight, trace.plain, *trace.iterations, *([] if trace.refit is None else [trace.refit])]
