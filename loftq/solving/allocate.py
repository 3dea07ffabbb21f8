"""Chooses the bits of each layer by the error that each width leaves: a first pass over the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from tqdm import tqdm

from loftq.calibration.statistics import Statistics
from loftq.core.allocation import least_error, waterfilled
from loftq.core.codebooks import TYPES
from loftq.core.grid import Decoder
from loftq.core.trellis import LENGTHS, TrellisQuantizer
from loftq.models.devices import is_here
from loftq.planning.plan import Layer, Plan
from loftq.planning.run import Run
from loftq.planning.settings import SENSITIVE
from loftq.planning.weights import read_source_weight
from loftq.solving.layers import one_thread_each, run_jobs, solve_layer
from loftq.solving.sensitivity import measure_sensitivities

MeasureErrors = Callable[[Sequence[str], Callable[[str, list[float]], None]], None]  # of modules, in other processes


def allocate(
    plan: Plan, statistics: Statistics | None, run: Run, measure_elsewhere: MeasureErrors | None = None
) -> dict[str, float]:
    """The width of each linear under the plan's budget, so that the sum of squared errors with the adapter is least.

    A layer's error at a width is the error after one alternation: later alternations lower the errors of all layers by
    nearly the same factor. If there are statistics of the inputs, it is the relative error of the outputs times the
    number of weights: the perplexity that a layer costs was measured to grow with its size. If the allocation is
    `sensitive`, it is what this error changes in the answers (`solving.sensitivity`). Layers are measured in threads of
    this process, unless `measure_elsewhere` does it; sensitivities always in this process.
    """
    recipe = plan.recipe
    factors = _factors(plan, statistics, run)
    layers = {layer.module: layer for layer in plan.linears}
    errors: dict[str, list[float]] = {}
    total = sum(layer.weights for layer in plan.linears)
    bar = tqdm(total=total, unit="w", unit_scale=True, disable=run.quiet, dynamic_ncols=True, desc="widths")

    def measured(name: str, of_widths: list[float]) -> None:
        errors[name] = [error * factors[name] for error in of_widths]
        bar.update(layers[name].weights)

    def measure(name: str) -> None:
        measured(name, errors_of_widths(plan, layers[name], statistics, run.device))

    with bar, one_thread_each():
        if measure_elsewhere is None:
            run_jobs(measure, list(layers), run.workers)
        else:
            measure_elsewhere(list(layers), measured)
    weights = [layer.weights for layer in plan.linears]
    by_width = {width: [errors[layer.module][i] for layer in plan.linears] for i, width in enumerate(recipe.widths)}
    kind = TYPES[recipe.quant_type]
    if kind.trellis and recipe.allocation == SENSITIVE:
        chosen = waterfilled(weights, by_width[recipe.bits], recipe.bits, kind.widths[0], kind.widths[-1])
    else:
        chosen = least_error(weights, by_width, recipe.bits)
    return dict(zip(layers, chosen, strict=True))


def _factors(plan: Plan, statistics: Statistics | None, run: Run) -> dict[str, float]:
    """What the error of each linear counts."""
    if statistics is None:
        return {layer.module: 1.0 for layer in plan.linears}
    if plan.recipe.allocation != SENSITIVE:
        return {layer.module: layer.weights for layer in plan.linears}
    device = run.device if is_here(run.device) else torch.device("cpu")
    return measure_sensitivities(plan, statistics, device, trust_remote_code=run.trust_remote_code, quiet=run.quiet)


def errors_of_widths(plan: Plan, layer: Layer, statistics: Statistics | None, device: torch.device) -> list[float]:
    """The squared error of a layer at each width; with statistics, the relative one of its outputs."""
    recipe = plan.recipe
    weight, _ = read_source_weight(plan, layer, device)
    moment = None if statistics is None else statistics.moment(layer.module)
    errors = []
    for width in recipe.widths:
        once = min(recipe.iters, 1)
        trace = solve_layer(plan, layer, weight, moment, _quick(plan.decoder(layer, width)), once).trace
        if statistics is None:
            errors.append(trace.final**2)
        else:
            seen = trace.outputs or trace
            errors.append((seen.final / (seen.weight or 1.0)) ** 2)
    return errors


def _quick(quantizer: Decoder) -> Decoder:
    """The quantizer, or for a trellis the one with the fewest states: its errors stand in the same proportion."""
    return replace(quantizer, length=min(LENGTHS)) if isinstance(quantizer, TrellisQuantizer) else quantizer
