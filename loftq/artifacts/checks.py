"""Whether an artifact's headers and configurations say what `loftq.json` says: names, dtypes, shapes, completeness."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from loftq.artifacts.backbone import Backbone
from loftq.errors import CheckpointError, LoftQError
from loftq.formats import adapter as adapters
from loftq.formats.adapter import Adapter
from loftq.formats.artifact import MANIFEST
from loftq.formats.checkpoint import TensorSpec, read_header
from loftq.formats.layouts import LAYOUTS
from loftq.models.naming import map_names
from loftq.models.tasks import build_meta

UNREADABLE = (LoftQError, OSError, ValueError, KeyError, TypeError, AttributeError)  # what damaged files lead to


class Problem(NamedTuple):
    """What is wrong, and the file, tensor, layer or entry it is wrong with."""

    where: str
    what: str


def backbone_problems(backbone: Backbone, manifest: Mapping[str, Any]) -> Iterator[Problem]:
    """The quantized linears, what is stored beside them, and the entry of `config.json` that says how."""
    dtype = getattr(torch, manifest["recipe"]["compute_dtype"])
    entry = backbone.config.get("quantization_config") or {}
    if entry.get("quant_method") != backbone.format:
        found = entry.get("quant_method", "no method of quantization")
        yield Problem("config.json", f"says {found}, {MANIFEST} {backbone.format}")
    layout, stored = LAYOUTS[backbone.format], backbone.checkpoint.tensors
    for module, grid in backbone.grids.items():
        yield from _differences(layout.specs(module, backbone.shapes[module], grid, dtype), stored)
    for name, spec in stored.items():
        if name not in backbone.owners and spec.dtype.is_floating_point and spec.dtype != dtype:
            yield Problem(name, f"is stored as {_kind(spec)}, {MANIFEST} says {manifest['recipe']['compute_dtype']}")


def adapter_problems(backbone: Backbone, adapter: Adapter, recipe: Mapping[str, Any]) -> Iterator[Problem]:
    """The factors of every quantized linear, and the configuration with which peft runs them."""
    expected = {
        "r": recipe["rank"],
        "lora_alpha": recipe["alpha"],
        "use_rslora": recipe["rslora"],
        "qalora_group_size": recipe.get("pool_size"),
    }
    for key, value in expected.items():
        if adapter.config.get(key) != value:
            where = f"{adapters.FOLDER}/{adapters.CONFIG}"
            yield Problem(where, f"has {key} {adapter.config.get(key)}, {MANIFEST} says {value}")
    stored = {spec.name: spec for spec in read_header(adapter.folder / adapters.WEIGHTS)}
    for module, shape in backbone.shapes.items():
        wanted = adapters.specs(module, shape, recipe["rank"], recipe.get("pool_size"))
        yield from _differences(wanted, stored)
    for module in adapter.modules:
        if module not in backbone.shapes:
            yield Problem(module, f"has factors in the adapter, {MANIFEST} does not list it")


def model_problems(backbone: Backbone, adapter: Adapter | None, trust_remote_code: bool) -> Iterator[Problem]:
    """All that the model's class asks for, as transformers builds it from `config.json`.

    Raises SourceError where it cannot build it.
    """
    model, _ = build_meta(backbone.folder, task=backbone.task, trust_remote_code=trust_remote_code)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    found = {name: spec for name, spec in backbone.checkpoint.tensors.items() if name not in backbone.owners}
    for module, shape in backbone.shapes.items():
        name = f"{module}.weight"
        if wanted.get(name) not in (shape, shape[::-1]):  # GPT-2's are transposed
            yield Problem(module, f"is {shape}, config.json asks for {wanted.get(name, 'no such layer')}")
            return
        found[name] = TensorSpec(name, backbone.dtype, wanted[name])
    if adapter is not None:
        found |= {name: TensorSpec(name, torch.float32, adapter.shapes[key]) for name, key in adapter.saved.items()}
    try:
        names = map_names(model, found)
    except CheckpointError as error:
        yield Problem("config.json", f"describes another model: {error}")
    else:
        for name in names.left_out:
            yield Problem(name, "is not part of the model that config.json describes")


def collected(checks: Iterable[Problem], where: str) -> Iterator[Problem]:
    """Problems, and what keeps a check from going on as one more."""
    try:
        yield from checks
    except UNREADABLE as error:
        yield Problem(where, f"cannot be checked: {explained(error)}")


def explained(error: Exception) -> str:
    """An error in words: our own speak for themselves."""
    return str(error) if isinstance(error, LoftQError) else repr(error)


def _differences(expected: Iterable[TensorSpec], stored: Mapping[str, TensorSpec]) -> Iterator[Problem]:
    for spec in expected:
        found = stored.get(spec.name)
        if found is None:
            yield Problem(spec.name, "is missing")
        elif replace(found, name=spec.name) != spec:
            yield Problem(spec.name, f"is {_kind(found)} {found.shape}, expected {_kind(spec)} {spec.shape}")


def _kind(spec: TensorSpec) -> str:
    return str(spec.dtype).removeprefix("torch.")
