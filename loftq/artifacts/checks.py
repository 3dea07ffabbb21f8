"""Checks that the headers and configurations of an artifact match `loftq.json`: names, dtypes, shapes, completeness."""

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

UNREADABLE = (
    LoftQError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
)  # errors that damaged files can cause


class Problem(NamedTuple):
    """A problem, described by `what`, in the file, tensor, layer or entry `where`."""

    where: str
    what: str


def backbone_problems(backbone: Backbone, manifest: Mapping[str, Any]) -> Iterator[Problem]:
    """Check the quantized linears, the other tensors, and the quantization entry of `config.json`."""
    dtype = getattr(torch, manifest["recipe"]["compute_dtype"])
    entry = backbone.config.get("quantization_config") or {}
    if entry.get("quant_method") != LAYOUTS[backbone.format].METHOD:
        method = entry.get("quant_method", "no quantization method")
        yield Problem("config.json", f"names {method}, {MANIFEST} names {backbone.format}")
    layout, stored = LAYOUTS[backbone.format], backbone.checkpoint.tensors
    for module, grid in backbone.grids.items():
        yield from _differences(layout.specs(module, backbone.shapes[module], grid, dtype), stored)
    for name, spec in stored.items():
        if name not in backbone.owners and spec.dtype.is_floating_point and spec.dtype != dtype:
            yield Problem(name, f"is stored as {_kind(spec)}, {MANIFEST} says {manifest['recipe']['compute_dtype']}")


def adapter_problems(backbone: Backbone, adapter: Adapter, recipe: Mapping[str, Any]) -> Iterator[Problem]:
    """Check the factors of every quantized linear, and the configuration that peft reads."""
    expected = {
        "r": recipe["rank"],
        "lora_alpha": recipe["alpha"],
        "use_rslora": recipe["rslora"],
        "qalora_group_size": recipe.get("pool_size"),
    }
    for key, value in expected.items():
        if adapter.config.get(key) != value:
            where = f"{adapters.FOLDER}/{adapters.CONFIG}"
            yield Problem(where, f"has {key} {adapter.config.get(key)}, {MANIFEST} has {value}")
    stored = {spec.name: spec for spec in read_header(adapter.folder / adapters.WEIGHTS)}
    for module, shape in backbone.shapes.items():
        rank = recipe["rank"] if len(shape) == 2 else recipe["expert_rank"]
        specs = adapters.specs(module, shape, rank, recipe.get("pool_size"))
        yield from _differences(specs, stored)
    for module in adapter.modules:
        if module not in backbone.shapes:
            yield Problem(module, f"has factors in the adapter, but {MANIFEST} does not list it")


def model_problems(backbone: Backbone, adapter: Adapter | None, trust_remote_code: bool) -> Iterator[Problem]:
    """Check that all tensors are present that the model needs which transformers builds from `config.json`.

    Raises SourceError if transformers cannot build the model.
    """
    model, _ = build_meta(backbone.folder, task=backbone.task, trust_remote_code=trust_remote_code)
    needed = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    specs = {name: spec for name, spec in backbone.checkpoint.tensors.items() if name not in backbone.owners}
    for module, shape in backbone.shapes.items():
        name = f"{module}.weight" if len(shape) == 2 else module
        transposed = (*shape[:-2], *shape[:-3:-1])  # as the weights of GPT-2 and the experts of gpt-oss are
        if needed.get(name) not in (shape, transposed):
            yield Problem(module, f"is {shape}, config.json needs {needed.get(name, 'no such layer')}")
            return
        specs[name] = TensorSpec(name, backbone.dtype, needed[name])
    if adapter is not None:
        specs |= {name: TensorSpec(name, torch.float32, adapter.shapes[key]) for name, key in adapter.saved.items()}
    try:
        names = map_names(model, specs)
    except CheckpointError as error:
        yield Problem("config.json", f"describes a different model: {error}")
    else:
        for name in names.left_out:
            yield Problem(name, "is not part of the model that config.json describes")


def collected(checks: Iterable[Problem], where: str) -> Iterator[Problem]:
    """The problems that checks report. An error that stops the checks is one more problem."""
    try:
        yield from checks
    except UNREADABLE as error:
        yield Problem(where, f"cannot be checked: {explained(error)}")


def explained(error: Exception) -> str:
    """An error as text: the message of a LoftQError, the type and message of any other error."""
    return str(error) if isinstance(error, LoftQError) else repr(error)


def _differences(expected: Iterable[TensorSpec], stored: Mapping[str, TensorSpec]) -> Iterator[Problem]:
    for spec in expected:
        stored_spec = stored.get(spec.name)
        if stored_spec is None:
            yield Problem(spec.name, "is missing")
        elif replace(stored_spec, name=spec.name) != spec:
            yield Problem(
                spec.name, f"is {_kind(stored_spec)} {stored_spec.shape}, expected {_kind(spec)} {spec.shape}"
            )


def _kind(spec: TensorSpec) -> str:
    return str(spec.dtype).removeprefix("torch.")
