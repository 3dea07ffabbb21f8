"""Checks that an adapter belongs to a model: an adapter works only on the weights on which it was trained.

`training.json` beside a trained adapter holds a hash of these weights. For an artifact, it is the hash in the manifest.
For any other checkpoint, it is a hash of samples, because reading all weights once more takes longer than loading them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from loftq.errors import ArtifactError
from loftq.formats.adapter import Adapter, open_adapter
from loftq.formats.artifact import MANIFEST, Artifact, combine_hashes, open_artifact
from loftq.formats.checkpoint import Checkpoint
from loftq.formats.links import refuse_links
from loftq.formats.model_config import FILE
from loftq.formats.schema import read_json

if TYPE_CHECKING:
    from torch import nn

TRAINING_RECORD = "training.json"
TRAINING_SCHEMA = {"settings?": dict, "backbone?": {"model": str, "sha256": str, "relative?": str}}
_SAMPLE = 256  # number of values of each tensor: if training changes a tensor, it also changes its first rows
_SIDES = (("in_features", "nx"), ("out_features", "nf"))  # attributes of linears, and of transformers' Conv1D


def sampled_hash(checkpoint: Checkpoint) -> str:
    """Hash that identifies a checkpoint's weights.

    It does not depend on how they are sharded, and is the same for float32 weights and their rounding to bfloat16.
    """
    import torch

    hashes = {}
    for name, spec in checkpoint.tensors.items():
        values = checkpoint.read_first(name, _SAMPLE)
        values = values.bfloat16() if values.is_floating_point() else values
        data = values.contiguous().view(torch.uint8).numpy().tobytes()
        hashes[name] = hashlib.sha256(str(spec.shape).encode() + data).hexdigest()
    return combine_hashes(hashes)


def trained_on(adapter: Path) -> tuple[str, str] | None:
    """Name and hash of the model on which an adapter, or a checkpoint of it, was trained; None if not recorded.

    Raises ArtifactError for a damaged record.
    """
    backbone = training_record(adapter)
    return None if backbone is None else (backbone["model"], backbone["sha256"])


def training_record(adapter: Path) -> dict[str, str] | None:
    """What `training.json` says of the backbone of an adapter, or of a checkpoint of it; None if there is no record.

    `model` is its name, `sha256` the hash of its weights, `relative` the way to it from `folder`, which holds the
    record. Raises ArtifactError for a damaged record.
    """
    folder = adapter.resolve()
    path = (folder.parent if folder.name.startswith("checkpoint-") else folder) / TRAINING_RECORD
    refuse_links(path.parent, [TRAINING_RECORD], ArtifactError)
    backbone = read_json(path, TRAINING_SCHEMA).get("backbone") if path.is_file() else None
    return None if backbone is None else {**backbone, "folder": str(path.parent)}


def foreign_adapter(folder: Path, name: str, checkpoint: Checkpoint, *, quantized: bool = False) -> Adapter:
    """Open an adapter for the model `name`, which is not an artifact; `quantized` if its weights are.

    Raises ArtifactError if the adapter was trained on a different model, or on the original of a quantized one.
    """
    adapter = open_adapter(folder)
    base_model = adapter.config.get("base_model_name_or_path")
    if base_model and (Path(base_model) / MANIFEST).is_file():
        raise ArtifactError(
            f"the adapter {folder} was trained on the quantized backbone {base_model}; on the original weights it "
            f"counts the rounding error twice: use {base_model} instead of {name}"
        )
    trained = trained_on(folder)
    if trained is not None and trained[1] != sampled_hash(checkpoint):
        raise ArtifactError(
            f"the adapter {folder} was trained on {trained[0]}, whose weights differ from those of {name}: "
            f"use {trained[0]}, or train an adapter on {name}"
        )
    original = trained_on_original(adapter, None) if quantized else None
    if original is not None:
        raise ArtifactError(
            f"the adapter {folder} was trained on the full-precision weights of {original}, not on the quantized "
            f"{name}: use {original}, or train an adapter on {name}"
        )
    return adapter


def check_shapes(model: nn.Module, adapter: Adapter, name: str) -> None:
    """Raise ArtifactError if a model lacks a module that an adapter adapts, or if the module's shape differs."""
    modules = dict(model.named_modules())
    for module in adapter.modules:
        if module not in modules:
            raise ArtifactError(
                f"the adapter {adapter.folder} adapts {module!r}, which {name} does not have: "
                "use an adapter that was trained on this model"
            )
        layer = modules[module]
        expected = [getattr(layer, linear, getattr(layer, conv, None)) for linear, conv in _SIDES]
        a, b = (adapter.shapes[key] for key in adapter.keys(module))
        sizes = [a[1] * (adapter.pool_size or 1), b[0]]
        if None not in expected and sizes != expected:
            raise ArtifactError(
                f"the adapter {adapter.folder} does not fit {name}: it is for {module!r} with {sizes[0]} inputs and "
                f"{sizes[1]} outputs, but the module has {expected[0]} and {expected[1]}: "
                "use an adapter that was trained on this model"
            )


def check_adapter(artifact: Artifact, folder: Path) -> Adapter:
    """Open an adapter. Raises ArtifactError unless it was initialized for, or trained on, this backbone."""
    adapter = fitting_adapter(artifact, folder)
    other = other_backbone(artifact, adapter)
    if other is not None:
        raise ArtifactError(
            f"the adapter {folder} was trained on {other}, not on the backbone {artifact.folder}: "
            f"use {other}, or train an adapter on this backbone"
        )
    return adapter


def is_exported_from(artifact: Artifact, folder: Path) -> bool:
    """Whether a folder holds the plain LoRA that `loftq merge --to lora` made of a QA-LoRA of this backbone."""
    if artifact.manifest["kind"] != "qalora" or not (folder / MANIFEST).is_file():
        return False
    return open_artifact(folder).backbone_hash == artifact.backbone_hash and open_adapter(folder).pool_size is None


def other_backbone(artifact: Artifact, adapter: Adapter) -> str | None:
    """The backbone of an adapter if it is known and differs from the artifact's; None otherwise."""
    if adapter.folder.resolve() == artifact.adapter.resolve():
        return None
    base_model = adapter.config.get("base_model_name_or_path")
    trained = trained_on(adapter.folder)
    if trained is None and base_model and (Path(base_model) / MANIFEST).is_file():
        trained = str(base_model), open_artifact(base_model).backbone_hash
    if trained is None:
        return trained_on_original(adapter, artifact.manifest["source"]["model"])
    return None if trained[1] == artifact.backbone_hash else trained[0]


def trained_on_original(adapter: Adapter, source: str | None) -> str | None:
    """The name of the full-precision model on which an adapter was trained; None if that were quantized weights.

    `source` is the name of the model from which the backbone was quantized. If it is unknown where an adapter was
    trained, the answer is None.
    """
    base_model = adapter.config.get("base_model_name_or_path")
    if not base_model or trained_on(adapter.folder) is not None:
        return None
    folder = Path(base_model)
    if source is not None:
        same = base_model == source or (folder.is_dir() and folder.resolve() == Path(source).resolve())
        if same or f"models--{source.replace('/', '--')}" in folder.parts:
            return str(base_model)
    is_model = (folder / FILE).is_file() and not (folder / MANIFEST).is_file()
    return (
        str(base_model)
        if is_model and "quantization_config" not in read_json(folder / FILE, {}, foreign=True)
        else None
    )


def fitting_adapter(artifact: Artifact, folder: Path) -> Adapter:
    """Open an adapter. Raises ArtifactError unless its kind and its shapes are those that an artifact takes."""
    adapter, expected = open_adapter(folder), open_adapter(artifact.adapter)
    if adapter.kind != expected.kind:
        raise ArtifactError(
            f"the adapter {folder} is a {adapter.kind} adapter: {artifact.folder} takes a {expected.kind} adapter"
        )
    unknown = sorted(set(adapter.modules) - set(expected.modules))
    if unknown:
        raise ArtifactError(
            f"the adapter {folder} adapts {unknown[0]!r}, which has no adapter in {artifact.folder}: "
            "use an adapter of this artifact"
        )
    for module in adapter.modules:
        for key, other, side in zip(adapter.keys(module), expected.keys(module), (1, 0), strict=True):
            shape, right = adapter.shapes[key], expected.shapes[other]
            if len(shape) != len(right) or shape[side] != right[side]:
                raise ArtifactError(
                    f"the adapter {folder} does not fit {artifact.folder}: {key} is {' x '.join(map(str, shape))}, "
                    f"expected {right[0]} x {right[1]}: use an adapter of this artifact"
                )
    return adapter
