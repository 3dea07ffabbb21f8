"""The plan of an adapter for a backbone that is quantized already, by another program: `loftq quantize --backbone`.

Only the linears that the backbone quantizes get factors. Nothing of the backbone is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loftq.core.solvers.methods import METHODS, WITHOUT_TEXT
from loftq.display import few_of
from loftq.errors import CheckpointError, OptionError, SourceError
from loftq.formats import adapter
from loftq.formats.adapter_targets import target_names
from loftq.formats.checkpoint import dtype_of
from loftq.formats.given_weights import given_view
from loftq.formats.model_config import read_config
from loftq.formats.prequantized import DenseView
from loftq.hub.names import repository_of
from loftq.hub.source import Source, find_source
from loftq.models import naming
from loftq.models.tasks import build_meta
from loftq.planning.given_gguf import find_gguf, is_gguf
from loftq.planning.plan import Layer, Plan
from loftq.planning.planner import POOLER, lay_out_adapter, make_plan
from loftq.planning.recipe import Recipe, resolve
from loftq.planning.settings import QuantizeSettings
from loftq.settings import declared, said

WITH_TEXT = "qera"  # the method where there is text and none is named: the closed form of the factors
SETTINGS = (  # those that an adapter for a given backbone uses
    "backbone",
    "method",
    "svd",
    "seed",
    "rank",
    "alpha",
    "rslora",
    "dropout",
    "calibration",
    "calibration_tokens",
    "sequence_length",
    "target_modules",
    "exclude_modules",
    "task",
    "num_labels",
)
_ROWS: dict[str, Any] = {"bits": 8, "quant_type": "int", "adapter": "lora"}  # a type that any linear can have


@dataclass(frozen=True)
class GivenBackbone:
    """The quantized model: `source` holds its dense view, `names` the tensors of the plan's modules in it."""

    source: Source
    title: str
    names: Mapping[str, str]

    @property
    def revision(self) -> str | None:
        """The commit on the Hub; None for a folder."""
        return self.source.revision

    def read(self, layer: Layer) -> torch.Tensor:
        """The weight (out, in) of a layer as its program computes it: float32. Raises CheckpointError."""
        stored = self.source.checkpoint.read(self.names[layer.module])
        weight = (stored.t() if layer.transposed else stored).float().contiguous()
        if tuple(weight.shape) != tuple(layer.shape):
            raise CheckpointError(
                f"{self.source.name}: {self.names[layer.module]} has shape {tuple(weight.shape)}, expected "
                f"{tuple(layer.shape)}"
            )
        return weight


def adapter_recipe(requested: QuantizeSettings) -> Recipe:
    """The recipe of an adapter for a given backbone. Raises OptionError for a setting that it has no use for."""
    for name, value in said(requested).items():
        if name not in SETTINGS:
            raise OptionError(
                f"{declared(QuantizeSettings)[name].option} {value}: the weights of --backbone {requested.backbone} "
                "stay as they are, and only the adapter is computed: leave the option out"
            )
    method = requested.method or (WITHOUT_TEXT if requested.calibration is None else WITH_TEXT)
    usable = [name for name, row in METHODS.items() if row.plain and row.iterations]
    if method not in usable:
        raise OptionError(f"--method {method}: with --backbone only the adapter is computed: use {', '.join(usable)}")
    if requested.svd == "exact" and requested.calibration is not None:
        raise OptionError("--svd exact: applies only to LoftQ without text: leave it out")
    decided = resolve(replace(requested, **_ROWS, method=method, iters=1, refine=0 if requested.calibration else None))
    return replace(decided, requested=requested)


def recorded_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings of a recipe that the adapter depends on, as `loftq.json` holds them."""
    return {name: getattr(recipe, name) for name in SETTINGS if name != "backbone"}


def find_backbone(
    name: str, original: Source, token: str | None, *, trust_remote_code: bool, headers_only: bool = False
) -> Source:
    """The quantized model, as dense tensors. Raises SourceError for one that cannot be found or read.

    `original` is the full-precision model, from which a GGUF file gets the names of its weights.
    """
    if is_gguf(name):
        tensors = len(original.checkpoint.tensors)
        model, _ = build_meta(original.folder, trust_remote_code=trust_remote_code, tensors=tensors)
        return find_gguf(name, model, token)
    source = find_source(name, token=token, trust_remote_code=trust_remote_code, headers_only=headers_only)
    config = read_config(source.folder, tensors=len(source.checkpoint.tensors))
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return source
    return replace(
        source, checkpoint=given_view(source.checkpoint, quantization, dtype_of(config), f"--backbone {name}")
    )


def plan_adapter(
    source: Source, backbone: Source, recipe: Recipe, *, trust_remote_code: bool = False
) -> tuple[Plan, GivenBackbone]:
    """The plan of an adapter, in which only the adapter is written. Raises SourceError for a backbone that differs."""
    plan = make_plan(source, recipe, trust_remote_code=trust_remote_code, with_experts=False)
    names = _names_in(plan, source, backbone)
    view = backbone.checkpoint
    title = view.title if isinstance(view, DenseView) else "in 16 bits"
    quantized = view.decoded if isinstance(view, DenseView) else view.tensors
    layers = tuple(layer for layer in plan.layers if names.get(f"{layer.module}.weight") in quantized)
    left = [layer.module for layer in plan.layers if layer not in layers]
    if not layers or (left and recipe.target_modules is not None):
        named = "" if recipe.target_modules is None else "--target-modules: "
        raise OptionError(
            f"{named}{few_of(left)}: not quantized in {backbone.name} ({title}), so there is nothing to correct: name "
            "another --backbone or other modules"
        )
    passed, created = (
        {name: spec for name, spec in part.items() if adapter.is_key(spec.name)} for part in (plan.passed, plan.created)
    )
    notes = [f"the backbone is {backbone.name} ({title}), which stays as it is"]
    if left:
        notes.append(f"not quantized in the backbone, so without an adapter: {few_of(left)}")
    modules = [name for name, _ in plan.model.named_modules()]
    chosen = replace(
        plan,
        layers=layers,
        backbone=(),
        adapter=lay_out_adapter(layers, {**passed, **created}, recipe),
        target_modules=tuple(target_names([layer.module for layer in layers], modules)),
        notes=tuple(notes),
        passed=passed,
        created=created,
    )
    found = {layer.module: names[f"{layer.module}.weight"] for layer in layers}
    return chosen, GivenBackbone(backbone, title, found)


def _names_in(plan: Plan, source: Source, backbone: Source) -> Mapping[str, str]:
    """The tensors of the backbone by the names of parameters. Raises SourceError if it is another model's."""
    tensors = backbone.checkpoint.tensors
    heads = plan.modules_to_save
    try:
        names = naming.map_names(plan.model, tensors, new=(*heads, POOLER), resized=heads)
    except CheckpointError as error:
        raise SourceError(f"--backbone {backbone.name} is not a quantization of {source.name}: {error}") from error
    unknown = [name for name in names.left_out if name.endswith(".weight") and name not in source.checkpoint.tensors]
    if unknown:
        raise SourceError(
            f"--backbone {backbone.name} is not a quantization of {source.name}, which lacks {few_of(unknown)}"
        )
    return names.source


def base_name(backbone: Source, given: str) -> tuple[str, str | None]:
    """The name of the backbone and its revision, for the configuration of the adapter."""
    if Path(given).expanduser().exists():
        return str(Path(given).expanduser().resolve()), None
    return backbone.name, repository_of(given)[1]
