"""Computes the errors of an adapter for a given backbone again, from the source, the backbone and its factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from loftq.artifacts.checks import Problem
from loftq.artifacts.recompute import differ
from loftq.core.error import squared_error
from loftq.core.metric import squared
from loftq.errors import ArtifactError, LoftQError
from loftq.formats.adapter import read_adapter
from loftq.formats.artifact import MANIFEST, Artifact, combine_hashes
from loftq.hub.source import Source
from loftq.planning.given_backbone import adapter_recipe, find_backbone, plan_adapter
from loftq.planning.settings import QuantizeSettings
from loftq.planning.weights import digest_of, read_source_weight
from loftq.settings import from_dict


def compare_with_backbone(
    artifact: Artifact, source: Source, trust_remote_code: bool, advance: Callable[[int], object]
) -> Iterator[Problem]:
    """Compare the error of every layer with that in the manifest. `advance` is called with the weights that are done.

    Raises ArtifactError for another source, and for a backbone that cannot be read.
    """
    manifest = artifact.manifest
    given, rows = manifest["backbone"], {row["name"]: row for row in manifest["layers"]}
    name = given["model"] if given["revision"] is None else f"{given['model']}@{given['revision']}"
    recipe = adapter_recipe(from_dict(QuantizeSettings, {**manifest["recipe"], "backbone": name}))
    try:
        found = find_backbone(name, source, None, trust_remote_code=trust_remote_code)
        plan, backbone = plan_adapter(source, found, recipe, trust_remote_code=trust_remote_code)
    except LoftQError as error:
        raise ArtifactError(f"the backbone cannot be compared with {source.name}: {error}") from error
    if {layer.module for layer in plan.layers} != rows.keys():
        raise ArtifactError(f"{MANIFEST} lists other layers than {name} and {source.name} have together")
    adapter = read_adapter(artifact.adapter)
    digests = {}
    for layer in plan.layers:
        row = rows[layer.module]
        weight, digests[layer.tensor] = read_source_weight(plan, layer, torch.device("cpu"))
        norm = squared(weight) ** 0.5
        if differ(norm, row["weight_norm"], norm):
            yield Problem(
                layer.module, f"the weight of {source.name} has norm {norm:.6g}, not {row['weight_norm']:.6g}"
            )
            return
        left = squared_error(
            weight, backbone.read(layer), adapter.factors(layer.module), adapter.scaling_of(layer.module)
        )
        relative = (left**0.5) / (norm or 1.0)
        if differ(relative, row["error"], row["error"]):
            yield Problem(layer.module, f"has the relative error {relative:.6g}, {MANIFEST} has {row['error']:.6g}")
        advance(layer.weights)
    digests |= {name: digest_of(plan.source.checkpoint.read(name)) for name in plan.passed}
    if combine_hashes(digests) != manifest["source"].get("sha256"):
        yield Problem(
            source.name, "SHA-256 mismatch of its weights: it is not the model that the adapter was made from"
        )
