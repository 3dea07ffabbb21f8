"""Finds the model that a name stands for, and says which it is."""

from __future__ import annotations

from pathlib import Path

from loftq.errors import ArtifactError
from loftq.formats import gptq
from loftq.formats.adapter import CONFIG
from loftq.formats.artifact import MANIFEST, Artifact, open_artifact
from loftq.formats.checkpoint import read_checkpoint
from loftq.hub.source import Source, fetch_all, find_source
from loftq.models.adapters import sampled_hash

Model = Artifact | Source | Path  # ours, full precision, or a folder of GPTQ


def find_model(name: str) -> Model:
    """A folder of ours, here or on the Hub, a folder of GPTQ, or a full-precision model. Raises LoftQError."""
    folder = Path(name).expanduser()
    if (folder / MANIFEST).is_file():
        return open_artifact(folder)
    if (folder / CONFIG).is_file() and not (folder / "config.json").is_file():
        raise ArtifactError(
            f"{folder} is an adapter's folder: name its backbone (`loftq evaluate` and `loftq generate` then "
            "take this folder as --adapter)"
        )
    if folder.is_dir() and gptq.is_gptq(folder):
        return folder
    source = find_source(name)
    if not (source.folder / MANIFEST).is_file():
        return source
    return open_artifact(fetch_all(source))


def identity_of(found: Model) -> dict[str, str]:
    """What `training.json` says of the model under an adapter: its name, and the hash by which it is known again."""
    if isinstance(found, Artifact):
        return {"model": str(found.folder.resolve()), "sha256": found.backbone_hash}
    if isinstance(found, Path):
        return {"model": str(found.resolve()), "sha256": sampled_hash(read_checkpoint(found))}
    return {"model": found.name, "sha256": sampled_hash(found.checkpoint)}
