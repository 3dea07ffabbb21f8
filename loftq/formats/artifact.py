"""MODEL_DIR as a whole: a backbone, its adapter, and `loftq.json`, which is written last.

A folder with a `loftq.json` is complete: the manifest lists every file with its size and hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.errors import ArtifactError
from loftq.formats import adapter

MANIFEST = "loftq.json"
CARD = "README.md"  # the user's to edit
VERSION = 1


@dataclass(frozen=True)
class Artifact:
    """A complete folder of ours and what its manifest says."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def adapter(self) -> Path:
        """Where the initial adapter lies."""
        return self.folder / adapter.FOLDER

    @property
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """Size in bytes and SHA-256 of every file, by its name relative to the folder."""
        found: Mapping[str, Mapping[str, Any]] = self.manifest["files"]
        return found

    @property
    def backbone_hash(self) -> str:
        """Identifies the quantized backbone: an adapter belongs to exactly one."""
        return str(self.manifest["backbone_sha256"])


def open_artifact(folder: Path | str) -> Artifact:
    """Open a folder of ours. Raises ArtifactError where it is none, incomplete, or of a newer version."""
    artifact = read_artifact(folder)
    for name, entry in artifact.files.items():
        path = artifact.folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: {MANIFEST} lists it")
        found, expected = path.stat().st_size, int(entry["bytes"])
        if name.endswith(".safetensors") and found != expected:
            raise ArtifactError(f"{path} has {found} bytes, expected {expected}")
    return artifact


def read_artifact(folder: Path | str) -> Artifact:
    """A folder of ours by its manifest alone, whatever became of its other files. Raises ArtifactError."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder: expected one that `loftq quantize` wrote")
    if not path.is_file():
        raise ArtifactError(
            f"{folder} has no {MANIFEST}: it is not a loftq folder, or its making was interrupted "
            "(`loftq quantize ... --resume` finishes it)"
        )
    return Artifact(folder, read_manifest(path))


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest with all that readers rely on in it. Raises ArtifactError."""
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = int(manifest["format_version"])
        if version > VERSION:
            raise ArtifactError(f"{path} has format version {version}, this loftq reads up to {VERSION}: upgrade loftq")
        lacking = [name for name in ("kind", "recipe", "backbone_sha256") if name not in manifest]
        if lacking:
            raise KeyError(lacking[0])
        for entry in manifest["files"].values():
            int(entry["bytes"])
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged: {error!r}") from error


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files, by name."""
    found = {}
    for name in sorted(names):
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[name] = {"bytes": (folder / name).stat().st_size, "sha256": digest}
    return found


def combine_hashes(hashes: Mapping[str, str]) -> str:
    """One SHA-256 for named parts, whatever order they came in."""
    lines = "".join(f"{name} {value}\n" for name, value in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
