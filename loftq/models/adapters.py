"""Which model an adapter was trained on: an adapter counts on the weights of one.

`training.json` beside a trained adapter holds a hash of them. That of an artifact is its manifest's; of any other
checkpoint it is one of samples, since to read all weights again takes longer than to load them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from loftq.errors import ArtifactError
from loftq.formats.adapter import Adapter, keys, open_adapter
from loftq.formats.artifact import MANIFEST, Artifact, combine_hashes, open_artifact
from loftq.formats.checkpoint import Checkpoint

TRAINING_RECORD = "training.json"
_SAMPLE = 256  # values of each tensor: a training that touches a tensor at all touches its first rows
_SIDES = (("in_features", "nx"), ("out_features", "nf"))  # of linears, and of transformers' Conv1D


def sampled_hash(checkpoint: Checkpoint) -> str:
    """Identifies a checkpoint's weights, however they are sharded; in float32 as in the bfloat16 that it rounds to."""
    hashes = {}
    for name, spec in checkpoint.tensors.items():
        values = checkpoint.read(name).flatten()[:_SAMPLE]
        values = values.bfloat16() if values.is_floating_point() else values
        shown = values.contiguous().view(torch.uint8).numpy().tobytes()
        hashes[name] = hashlib.sha256(str(spec.shape).encode() + shown).hexdigest()
    return combine_hashes(hashes)


def trained_on(adapter: Path) -> tuple[str, str] | None:
    """Name and hash of the model that an adapter, or a checkpoint of it, was trained on; None where none is told."""
    folder = adapter.resolve()
    path = (folder.parent if folder.name.startswith("checkpoint-") else folder) / TRAINING_RECORD
    try:
        backbone = json.loads(path.read_text(encoding="utf-8"))["backbone"]
        return str(backbone["model"]), str(backbone["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def foreign_adapter(folder: Path, name: str, checkpoint: Checkpoint) -> Adapter:
    """Open an adapter. Raises ArtifactError where it was trained on another model than `name`, which is no artifact."""
    adapter = open_adapter(folder)
    made_for = adapter.config.get("base_model_name_or_path")
    if made_for and (Path(made_for) / MANIFEST).is_file():
        raise ArtifactError(
            f"the adapter {folder} was trained on the quantized backbone {made_for}: on the original weights it "
            f"counts the rounding error twice: name {made_for} instead of {name}"
        )
    known = trained_on(folder)
    if known is not None and known[1] != sampled_hash(checkpoint):
        raise ArtifactError(
            f"the adapter {folder} was trained on {known[0]}, whose weights are others than those of {name}: "
            "name that model, or train an adapter on this one"
        )
    return adapter


def check_shapes(model: nn.Module, adapter: Adapter, name: str) -> None:
    """Raises ArtifactError where a model lacks a module that an adapter adapts, or has it in another shape."""
    modules = dict(model.named_modules())
    for module in adapter.modules:
        if module not in modules:
            raise ArtifactError(f"the adapter {adapter.folder} adapts {module!r}, which {name} does not have")
        layer = modules[module]
        ours = [getattr(layer, of, getattr(layer, conv, None)) for of, conv in _SIDES]
        a, b = (adapter.shapes[key] for key in keys(module))
        found = [a[1] * (adapter.pool_size or 1), b[0]]
        if None not in ours and found != ours:
            raise ArtifactError(
                f"the adapter {adapter.folder} does not fit {name}: it adapts {module!r} of {found[0]} inputs and "
                f"{found[1]} outputs, and that has {ours[0]} and {ours[1]}"
            )


def check_adapter(artifact: Artifact, folder: Path) -> Adapter:
    """Open an adapter. Raises ArtifactError unless it was made for, or trained on, this backbone."""
    adapter = fitting_adapter(artifact, folder)
    other = other_backbone(artifact, adapter)
    if other is not None:
        raise ArtifactError(
            f"the adapter {folder} was trained on {other}, another backbone than {artifact.folder}: "
            "name that one, or train an adapter on this one"
        )
    return adapter


def other_backbone(artifact: Artifact, adapter: Adapter) -> str | None:
    """The backbone that an adapter was made for, where that can be told and is another one."""
    if adapter.folder.resolve() == artifact.adapter.resolve():
        return None
    made_for = adapter.config.get("base_model_name_or_path")
    known = trained_on(adapter.folder)
    if known is None and made_for and (Path(made_for) / MANIFEST).is_file():
        known = str(made_for), open_artifact(made_for).backbone_hash
    return None if known is None or known[1] == artifact.backbone_hash else known[0]


def fitting_adapter(artifact: Artifact, folder: Path) -> Adapter:
    """Open an adapter. Raises ArtifactError unless it is of the kind and of the shapes that an artifact takes."""
    adapter, expected = open_adapter(folder), open_adapter(artifact.adapter)
    if adapter.kind != expected.kind:
        raise ArtifactError(
            f"the adapter {folder} is a {adapter.kind} adapter: {artifact.folder} takes a {expected.kind} one"
        )
    unknown = sorted(set(adapter.modules) - set(expected.modules))
    if unknown:
        raise ArtifactError(
            f"the adapter {folder} adapts {unknown[0]!r}, which {artifact.folder} does not have adapted"
        )
    for module in adapter.modules:
        for key, side in zip(keys(module), (1, 0), strict=True):
            found, ours = adapter.shapes[key], expected.shapes[key]
            if found[side] != ours[side]:
                raise ArtifactError(
                    f"the adapter {folder} does not fit {artifact.folder}: {key} is {found[0]} x {found[1]}, "
                    f"expected {ours[0]} x {ours[1]}"
                )
    return adapter
