"""The rows and totals of an artifact, which the table, the card and `loftq.json` all show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from loftq.core.solvers.loftq import Trace
from loftq.planning.plan import Layer, Plan


def planned_row(plan: Plan, layer: Layer) -> dict[str, Any]:
    """One layer as it is planned."""
    return {
        "name": layer.module,
        "shape": list(layer.shape),
        "codebook": plan.grid(layer).codebook,
        "bits_per_weight": plan.bits_of(layer),
    }


def layer_row(plan: Plan, layer: Layer, trace: Trace) -> dict[str, Any]:
    """One layer as it was solved: errors are norms relative to the weight's, or, of outputs, to the outputs'."""
    row = planned_row(plan, layer) | {"weight_norm": trace.weight, "kept_iteration": trace.kept}
    for prefix, errors in (("", trace), ("output_", trace.outputs)):
        if errors is not None:
            unit = errors.weight or 1.0
            fitted = {} if errors.refit is None else {f"{prefix}refit_error": errors.refit / unit}
            row |= fitted | {
                f"{prefix}plain_error": errors.plain / unit,
                f"{prefix}error": errors.final / unit,
                f"{prefix}iterations": [error / unit for error in errors.iterations],
            }
    return row


def totals_of(plan: Plan, rows: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Sizes, and over all layers the relative error of plain rounding and of what was saved.

    Weight errors are summed over all weights; of output errors, which layers have on scales of their own, the root of
    the mean square is taken over the layers that the calibration text reached.
    """
    found: dict[str, Any] = {
        "layers": len(plan.layers),
        "weights": plan.weights,
        "bits_per_weight": plan.layer_bits,
        "source_bytes": plan.source_bytes,
        "backbone_bytes": plan.backbone_bytes,
        "adapter_bytes": plan.adapter.nbytes,
        "expert_bytes": plan.expert_bytes,
    }
    return found | (summed_errors(rows) if rows else {})


def summed_errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The errors of layers together: of weights, relative to all weights' norm; of outputs, the root mean square."""
    found = {}
    norm = math.sqrt(sum(row["weight_norm"] ** 2 for row in rows)) or 1.0
    for key in ("plain_error", "refit_error", "error"):
        if any(key in row for row in rows):
            errors = [row.get(key, row["plain_error"]) * row["weight_norm"] for row in rows]
            found[key] = math.sqrt(sum(error**2 for error in errors)) / norm
    for key in ("output_plain_error", "output_refit_error", "output_error"):
        reached = [row[key] for row in rows if key in row]
        if reached:
            found[key] = math.sqrt(sum(error**2 for error in reached) / len(reached))
    return found
