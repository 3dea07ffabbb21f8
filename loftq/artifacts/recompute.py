"""Computes the errors of the layers of an artifact again, from the source and from the files as loaders read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from loftq.artifacts.checks import Problem
from loftq.artifacts.pair import BackboneAndAdapter
from loftq.core.error import squared_error
from loftq.core.metric import squared
from loftq.errors import ArtifactError, LoftQError
from loftq.formats.artifact import MANIFEST, combine_hashes
from loftq.hub.source import Source
from loftq.models.layout_linears import read_weight
from loftq.planning.plan import Layer, Plan
from loftq.planning.planner import make_plan
from loftq.planning.recipe import recipe_again
from loftq.planning.weights import ExpertReader, digest_of
from loftq.planning.weights import read_source_weight as read_source

_TOLERANCE = 1e-4  # relative: the order of sums and the rounding of a processor change an error by less
_UNREADABLE = (RuntimeError, ValueError, KeyError, AssertionError)  # readers raise these for damaged tensors
_LEAST = 1e-6  # relative to the weight's norm: float32 cannot show smaller errors


def plan_again(source: Source, manifest: Mapping[str, Any], trust_remote_code: bool) -> Plan:
    """The plan by which an artifact was made. Raises ArtifactError if it does not fit this source."""
    try:
        plan = make_plan(source, recipe_again(manifest["recipe"]), trust_remote_code=trust_remote_code)
    except LoftQError as error:
        raise ArtifactError(f"{_wrong_source(source, manifest)}: {error}") from error
    planned = {layer.module: list(layer.shape) for layer in plan.layers}
    if planned != {row["name"]: row["shape"] for row in manifest["layers"]}:
        raise ArtifactError(f"{_wrong_source(source, manifest)}: the names or shapes of its layers differ")
    return plan


def compare_with_source(
    pair: BackboneAndAdapter, plan: Plan, manifest: Mapping[str, Any], advance: Callable[[int], object]
) -> Iterator[Problem]:
    """Compare the error of every layer with that in the manifest, and every other tensor with that of the source.

    `advance` is called with the number of weights that are done. If the weights of the source differ from those that
    the artifact was made of, that is reported once, and the comparison of layers stops.
    """
    rows = {row["name"]: row for row in manifest["layers"]}
    digests = {}
    for layer in plan.layers:
        row = rows[layer.module]
        try:
            norm, error, digests[layer.tensor] = _measured(pair, plan, layer)
        except _UNREADABLE as problem:
            yield Problem(layer.module, f"cannot be read as {pair.backbone.format}: {problem}")
            digests[layer.tensor] = _digest(plan, layer)
            continue
        if differ(norm, row["weight_norm"], norm):
            difference = f"its {layer.tensor} has norm {norm:.6g}, {MANIFEST} has {row['weight_norm']:.6g}"
            yield Problem(plan.source.name, f"{_wrong_source(plan.source, manifest)}: {difference}")
            return
        if differ(error, row["error"], row["error"]):
            text = f"has the relative error {error:.6g}, {MANIFEST} has {row['error']:.6g}"
            yield Problem(layer.module, text)
        advance(layer.weights)
    for name, spec in plan.passed.items():
        stored = plan.source.checkpoint.read(name)
        digests[name] = digest_of(stored)
        file = pair.adapter if spec.name in pair.adapter.shapes else pair.backbone.checkpoint
        if not torch.equal(file.read(spec.name), stored.to(spec.dtype)):
            yield Problem(spec.name, f"differs from {name} of the source in {plan.recipe.compute_dtype}")
        advance(spec.numel)
    if combine_hashes(digests) != manifest["source"].get("sha256"):
        yield Problem(plan.source.name, f"{_wrong_source(plan.source, manifest)}: SHA-256 mismatch of its weights")


def _measured(pair: BackboneAndAdapter, plan: Plan, layer: Layer) -> tuple[float, float, str]:
    """The norm of a layer's weight, the relative error of the files, and the hash of the weight."""
    if not layer.experts:
        weight, digest = read_source(plan, layer, torch.device("cpu"))
        norm, left = squared(weight), _left(pair, layer, weight, None, pair.factors(layer.module))
    else:
        reader, factors = ExpertReader(plan, layer), pair.expert_factors(layer.module)
        norm = left = 0.0
        for expert, weight in enumerate(reader):
            norm += squared(weight)
            left += _left(pair, layer, weight, expert, None if factors is None else factors[expert])
        digest = reader.digest
    return norm**0.5, (left / (norm or 1.0)) ** 0.5, digest


def _digest(plan: Plan, layer: Layer) -> str:
    """The hash of a layer's weight."""
    if not layer.experts:
        return read_source(plan, layer, torch.device("cpu"))[1]
    reader = ExpertReader(plan, layer)
    for _ in reader:
        pass
    return reader.digest


def _left(
    pair: BackboneAndAdapter,
    layer: Layer,
    weight: torch.Tensor,
    expert: int | None,
    factors: tuple[torch.Tensor, torch.Tensor] | None,
) -> float:
    """The squared error that the files leave of a weight, as loaders read them."""
    backbone, module = pair.backbone, layer.module
    rounded = read_weight(backbone.format, module, layer.shape, backbone.grids[module], backbone.reader(expert))
    return squared_error(weight, rounded, factors, pair.adapter.scaling_of(module), pair.adapter.pool_size)


def differ(computed: float, reported: float, unit: float) -> bool:
    """Whether a computed error differs from a reported one by more than rounding explains."""
    return not abs(computed - reported) <= _TOLERANCE * unit + _LEAST  # written so that NaN differs


def _wrong_source(source: Source, manifest: Mapping[str, Any]) -> str:
    expected = manifest["source"]
    revision = f" at {expected['revision']}" if expected.get("revision") else ""
    return f"{source.name} is not the source of this folder, which is {expected['model']}{revision}"
