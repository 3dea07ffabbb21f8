"""Finds the model that a name stands for, and identifies it in a training's record."""

from __future__ import annotations

from pathlib import Path

from loftq.errors import ArtifactError
from loftq.formats import gptq
from loftq.formats.adapter import CONFIG
from loftq.formats.artifact import MANIFEST, Artifact, open_artifact
from loftq.formats.checkpoint import read_checkpoint
from loftq.hub.source import Source, fetch_all, find_source
from loftq.models.adapters import sampled_hash

Model = Artifact | Source | Path  # an artifact, a full-precision model, or the folder of a GPTQ checkpoint


def find_model(name: str) -> Model:
    """Find an artifact, here or on the Hub, the folder of a GPTQ checkpoint, or a full-precision model.

    Raises LoftQError.
    """
    folder = Path(name).expanduser()
    if (folder / MANIFEST).is_file():
        return open_artifact(folder)
    if (folder / CONFIG).is_file() and not (folder / "config.json").is_file():
        raise ArtifactError(
            f"{folder} is an adapter's folder: name its backbone instead, and give this folder to `loftq evaluate` or "
            "`loftq generate` with --adapter"
        )
    if folder.is_dir() and gptq.is_gptq(folder):
        return folder
    source = find_source(name)
    if not (source.folder / MANIFEST).is_file():
        return source
    return open_artifact(fetch_all(source))


def identity_of(backbone: Model) -> dict[str, str]:
    """The entry for an adapter's backbone in `training.json`: its name, and a hash that identifies its weights."""
    if isinstance(backbone, Artifact):
        return {"model": str(backbone.folder.resolve()), "sha256": backbone.backbone_hash}
    if isinstance(backbone, Path):
        return {"model": str(backbone.resolve()), "sha256": sampled_hash(read_checkpoint(backbone))}
    return {"model": backbone.name, "sha256": sampled_hash(backbone.checkpoint)}
