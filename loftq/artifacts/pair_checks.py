"""Checks before a merge that every tensor of an adapter has its place in the model, and that none is missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loftq.artifacts.backbone import Backbone
from loftq.artifacts.embeddings import Embeddings
from loftq.errors import ArtifactError
from loftq.formats.adapter import WEIGHTS, Adapter, check_values, key_of, specs

_USE = "use an adapter that was trained on this model, complete"


def check_tensors(model: Any, backbone: Backbone, adapter: Adapter, embeddings: Embeddings) -> None:
    """Raise ArtifactError unless an adapter's tensors are those that its configuration and the model ask for."""
    where = adapter.folder / WEIGHTS
    _check_factors(backbone, adapter)
    expected = _saved_shapes(model, adapter)
    for name, key in adapter.saved.items():
        if name in backbone.owners or any(name.startswith(f"{module}.") for module in adapter.modules):
            raise ArtifactError(f"{where} has {key}, which belongs to a quantized linear and cannot be merged: {_USE}")
        spec = backbone.checkpoint.tensors.get(name)
        shape = tuple(spec.shape) if spec is not None else expected.get(name)
        if shape is None and name not in embeddings.names:
            raise ArtifactError(f"{where} has {key}, which has no place in {backbone.folder}: {_USE}")
        found = adapter.shapes[key]
        shape = found if shape is None else shape
        resized = name in embeddings.names and found[1:] == shape[1:]
        if found != shape and not resized:
            raise ArtifactError(f"{where}: {key} is {found}, but {backbone.folder} has {shape} there: {_USE}")
    missing = sorted(expected.keys() - adapter.saved.keys())
    if missing:
        raise ArtifactError(f"{where} lacks {key_of(missing[0])}, which modules_to_save names: {_USE}")
    explained = {key for module in adapter.modules for key in adapter.keys(module)} | set(adapter.saved.values())
    explained |= set(adapter.copies)
    for key in sorted(adapter.shapes.keys() - explained):
        raise ArtifactError(f"{where} has {key}, which loftq does not know and cannot merge: use peft's own merge")
    check_values(adapter)


def _check_factors(backbone: Backbone, adapter: Adapter) -> None:
    where = adapter.folder / WEIGHTS
    if not adapter.modules:
        raise ArtifactError(f"{where} holds no factors: {_USE}")
    for module in adapter.modules:
        if module not in backbone.grids:
            raise ArtifactError(f"{where} adapts {module!r}, which is not a quantized linear of {backbone.folder}")
        rank = adapter.rank_of(module)
        expected = specs(module, backbone.shapes[module], rank, adapter.pool_size)
        for key, spec in zip(adapter.keys(module), expected, strict=True):
            if adapter.shapes[key] != spec.shape:
                raise ArtifactError(f"{where}: {key} is {adapter.shapes[key]}, expected {spec.shape}: {_USE}")
    for module in _targets(backbone, adapter):
        if not adapter.adapts(module):
            raise ArtifactError(f"{where} lacks the factors of {module!r}, which target_modules names: {_USE}")


def _targets(backbone: Backbone, adapter: Adapter) -> Iterator[str]:
    """The quantized linears that the adapter's configuration names, as peft reads it."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    selection = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    chosen = {key: adapter.config[key] for key in selection if adapter.config.get(key) is not None}
    if not chosen.get("target_modules") or chosen["target_modules"] == "all-linear":
        return
    config = LoraConfig(**chosen)
    for module in (name for name in backbone.grids if name not in backbone.stacks):
        if check_target_module_exists(config, module) is True or adapter.adapts(module):
            yield module


def _saved_shapes(model: Any, adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """The parameters of the modules that `modules_to_save` names, with their shapes in the model."""
    named = adapter.config.get("modules_to_save") or ()
    modules = [
        (path, module)
        for path, module in model.named_modules()
        if any(path == name or path.endswith(f".{name}") for name in named)
    ]
    return {
        f"{path}.{name}": tuple(tensor.shape)
        for path, module in modules
        for name, tensor in module.state_dict().items()
    }
