"""The errors of an artifact's layers, computed again: from the source, and the files as those who load them do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from loftq.artifacts.checks import Problem
from loftq.artifacts.pair import BackboneAndAdapter
from loftq.core.metric import squared
from loftq.errors import ArtifactError, LoftQError
from loftq.formats.artifact import MANIFEST, combine_hashes
from loftq.hub.source import Source
from loftq.models.layout_linears import read_weight
from loftq.planning.plan import Layer, Plan
from loftq.planning.planner import make_plan
from loftq.planning.recipe import recipe_again
from loftq.planning.weights import digest_of
from loftq.planning.weights import read_source_weight as read_source

_TOLERANCE = 1e-4  # of an error: sums in another order, and the last bits of a processor, move it less
_LEAST = 1e-6  # of the weight's norm, below which float32 shows no error


def plan_again(source: Source, manifest: Mapping[str, Any], trust_remote_code: bool) -> Plan:
    """The plan by which an artifact was made. Raises ArtifactError where it cannot be that of this source."""
    try:
        plan = make_plan(source, recipe_again(manifest["recipe"]), trust_remote_code=trust_remote_code)
    except LoftQError as error:
        raise ArtifactError(f"{_another(source, manifest)}: {error}") from error
    planned = {layer.module: list(layer.shape) for layer in plan.layers}
    if planned != {row["name"]: row["shape"] for row in manifest["layers"]}:
        raise ArtifactError(f"{_another(source, manifest)}: its layers have other names or shapes")
    return plan


def compare_with_source(
    pair: BackboneAndAdapter, plan: Plan, manifest: Mapping[str, Any], advance: Callable[[int], object]
) -> Iterator[Problem]:
    """Every layer's error against the manifest's, and every other tensor against the source's.

    `advance` is told of the weights that are done. A source of other weights is said to be one, once.
    """
    rows = {row["name"]: row for row in manifest["layers"]}
    digests = {}
    for layer in plan.layers:
        weight, digests[layer.tensor] = read_source(plan, layer, torch.device("cpu"))
        row = rows[layer.module]
        norm = squared(weight) ** 0.5
        if _differ(norm, row["weight_norm"], norm):
            what = f"its {layer.tensor} has norm {norm:.6g}, {MANIFEST} says {row['weight_norm']:.6g}"
            yield Problem(plan.source.name, f"{_another(plan.source, manifest)}: {what}")
            return
        yield from _compare_layer(pair, layer, weight, row)
        advance(layer.weights)
    for name, spec in plan.passed.items():
        stored = plan.source.checkpoint.read(name)
        digests[name] = digest_of(stored)
        holder = pair.adapter if spec.name in pair.adapter.shapes else pair.backbone.checkpoint
        found = holder.read(spec.name)
        if not torch.equal(found, stored.to(spec.dtype)):
            yield Problem(spec.name, f"is not the source's {name} in {plan.recipe.compute_dtype}")
        advance(spec.numel)
    if combine_hashes(digests) != manifest["source"].get("sha256"):
        yield Problem(plan.source.name, f"{_another(plan.source, manifest)}: its weights have another hash")


def _compare_layer(
    pair: BackboneAndAdapter, layer: Layer, weight: torch.Tensor, row: Mapping[str, Any]
) -> Iterator[Problem]:
    backbone, module = pair.backbone, layer.module
    try:
        read = backbone.checkpoint.read
        left = weight - read_weight(backbone.format, module, layer.shape, backbone.grids[module], read)
        added = pair.delta(module)
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:  # whatever a reader says of nonsense
        yield Problem(module, f"cannot be read as {backbone.format}: {error}")
        return
    if added is not None:
        left -= added
    found = (squared(left) / (squared(weight) or 1.0)) ** 0.5
    if _differ(found, row["error"], row["error"]):
        yield Problem(module, f"has an error of {found:.6g} of ‖W‖, {MANIFEST} says {row['error']:.6g}")


def _differ(found: float, said: float, unit: float) -> bool:
    return not abs(found - said) <= _TOLERANCE * unit + _LEAST  # so that NaN differs


def _another(source: Source, manifest: Mapping[str, Any]) -> str:
    made = manifest["source"]
    at = f" at {made['revision']}" if made.get("revision") else ""
    return f"{source.name} is not the model that this was made of, {made['model']}{at}"
