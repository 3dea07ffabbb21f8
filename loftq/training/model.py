"""Finds the model that a name stands for, and identifies it in a training's record."""

from __future__ import annotations

from pathlib import Path

from loftq.errors import ArtifactError
from loftq.formats import gptq
from loftq.formats.artifact import DENSE, MANIFEST, Artifact, open_artifact
from loftq.formats.checkpoint import read_checkpoint
from loftq.hub.source import Source, fetch_all, find_source
from loftq.models.adapters import sampled_hash
from loftq.models.trained_folder import backbone_name, is_adapter_folder, way_to

Model = Artifact | Source | Path  # an artifact, a full-precision model, or the folder of a GPTQ checkpoint


def find_model(name: str, *, headers_only: bool = False) -> Model:
    """Find an artifact, a GPTQ checkpoint, or a full-precision model: a folder, or `OWNER/NAME[@REVISION]` on the Hub.

    A model that was merged into 16 bits is a full-precision model. With `headers_only` the weights of a full-precision
    model on the Hub are not downloaded. Raises LoftQError.
    """
    folder = Path(name).expanduser()
    if is_adapter_folder(folder):
        raise ArtifactError(
            f"{folder} is an adapter's folder: name its backbone instead, {backbone_name(folder)}; `loftq evaluate`, "
            "`loftq generate`, `loftq merge` and `loftq inspect` take this folder too"
        )
    if (folder / MANIFEST).is_file():
        artifact = open_artifact(folder)
        return find_source(name) if artifact.manifest.get("format") == DENSE else artifact
    if folder.is_dir() and gptq.is_gptq(folder):
        return folder
    source = find_source(name, headers_only=headers_only)
    if gptq.is_gptq(source.folder):
        return fetch_all(source)
    if not (source.folder / MANIFEST).is_file():
        return source
    artifact = open_artifact(fetch_all(source))
    return source if artifact.manifest.get("format") == DENSE else artifact


def identity_of(backbone: Model, output: Path) -> dict[str, str]:
    """The entry for an adapter's backbone in `training.json`.

    It has the name of the backbone, a hash that identifies its weights, and the way to it from the folder `output`.
    """
    if isinstance(backbone, Source):
        way = {"relative": way_to(backbone.folder, output)} if backbone.local else {}
        return {"model": backbone.name, "sha256": sampled_hash(backbone.checkpoint), **way}
    folder = backbone.folder if isinstance(backbone, Artifact) else backbone
    digest = backbone.backbone_hash if isinstance(backbone, Artifact) else sampled_hash(read_checkpoint(folder))
    return {"model": str(folder.resolve()), "sha256": digest, "relative": way_to(folder, output)}
