"""The rows and totals of an artifact, which appear in the table, the card and `loftq.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from loftq.core.solvers.solution import Trace
from loftq.planning.plan import Layer, Plan


def planned_row(plan: Plan, layer: Layer) -> dict[str, Any]:
    """The row of a layer before it is solved."""
    return {
        "name": layer.module,
        "shape": list(layer.shape),
        "codebook": plan.grid(layer).codebook,
        "bits_per_weight": plan.bits_of(layer),
    }


def layer_row(plan: Plan, layer: Layer, trace: Trace) -> dict[str, Any]:
    """The row of a solved layer. Errors are relative to the norm of the weight, or of the outputs (`output_`)."""
    return planned_row(plan, layer) | error_entries(trace)


def error_entries(trace: Trace) -> dict[str, Any]:
    """The entries of a row that hold errors."""
    row: dict[str, Any] = {"weight_norm": trace.weight, "kept_iteration": trace.kept}
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
    """The sizes, and the relative errors of plain rounding and of the saved result over all layers.

    Weight errors are summed over all weights. The scales of output errors differ between layers, therefore their total
    is the root mean square over the layers that the calibration text reached.
    """
    totals: dict[str, Any] = {
        "layers": len(plan.layers),
        "weights": plan.weights,
        "bits_per_weight": plan.layer_bits,
        "source_bytes": plan.source_bytes,
        "backbone_bytes": plan.backbone_bytes,
        "adapter_bytes": plan.adapter.nbytes,
        "expert_bytes": plan.expert_bytes,
    }
    return totals | (summed_errors(rows) if rows else {})


def summed_errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The total errors of layers: of weights relative to the norm of all weights; of outputs the root mean square."""
    totals = {}
    norm = math.sqrt(sum(row["weight_norm"] ** 2 for row in rows)) or 1.0
    for key in ("plain_error", "refit_error", "error"):
        if any(key in row for row in rows):
            errors = [row.get(key, row["plain_error"]) * row["weight_norm"] for row in rows]
            totals[key] = math.sqrt(sum(error**2 for error in errors)) / norm
    for key in ("output_plain_error", "output_refit_error", "output_error"):
        errors = [row[key] for row in rows if key in row]
        if errors:
            totals[key] = math.sqrt(sum(error**2 for error in errors) / len(errors))
    return totals
