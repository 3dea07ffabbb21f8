"""The whole folder MODEL_DIR: a backbone, its adapter, and the manifest `loftq.json`, which is written last.

A folder with a `loftq.json` is complete. The manifest lists every file with its size and hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.errors import ArtifactError
from loftq.formats import adapter
from loftq.formats.disk import is_inside
from loftq.formats.links import refuse_links
from loftq.formats.model_files import model_file_names

MANIFEST = "loftq.json"
CARD = "README.md"  # the user may edit it
VERSION = 1


@dataclass(frozen=True)
class Artifact:
    """A complete loftq folder and the contents of its manifest."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def adapter(self) -> Path:
        """The folder of the initial adapter."""
        return self.folder / adapter.FOLDER

    @property
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """The size in bytes and the SHA-256 of every file, by its name relative to the folder."""
        files: Mapping[str, Mapping[str, Any]] = self.manifest["files"]
        return files

    @property
    def backbone_hash(self) -> str:
        """The hash of the quantized backbone. An adapter belongs to exactly one backbone."""
        return str(self.manifest["backbone_sha256"])


def open_artifact(folder: Path | str) -> Artifact:
    """Open a loftq folder. Raises ArtifactError if it is not one, is incomplete, or has a newer version."""
    artifact = read_artifact(folder)
    refuse_links(artifact.folder, [*artifact.files, *_read_names(artifact)], ArtifactError)
    for name, entry in artifact.files.items():
        if not is_inside(name):
            raise ArtifactError(f"{artifact.folder / MANIFEST} lists {name!r}, which lies outside its folder")
        path = artifact.folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: {MANIFEST} lists it")
        nbytes, expected = path.stat().st_size, int(entry["bytes"])
        if name.endswith(".safetensors") and nbytes != expected:
            raise ArtifactError(f"{path} has {nbytes} bytes, expected {expected}: copy or download it again")
    return artifact


def _read_names(artifact: Artifact) -> Iterator[str]:
    """The names of files that libraries read when they open a folder and its adapter, listed or not."""
    yield from model_file_names(artifact.folder)
    if artifact.adapter.is_dir():
        yield from (f"{adapter.FOLDER}/{name}" for name in model_file_names(artifact.adapter))


def read_artifact(folder: Path | str) -> Artifact:
    """A loftq folder, of which only the manifest is read and checked. Raises ArtifactError."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder: expected one that `loftq quantize` wrote")
    if not path.is_file():
        raise ArtifactError(
            f"{folder} has no {MANIFEST}: it is not a loftq folder, or the run that wrote it was interrupted "
            "(`loftq quantize ... --resume` finishes it)"
        )
    refuse_links(folder, [MANIFEST], ArtifactError)
    return Artifact(folder, read_manifest(path))


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest that has all entries that readers need. Raises ArtifactError."""
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = int(manifest["format_version"])
        if version > VERSION:
            raise ArtifactError(
                f"{path} has format version {version}, this loftq reads up to version {VERSION}: upgrade loftq"
            )
        missing = [name for name in ("kind", "recipe", "backbone_sha256") if name not in manifest]
        if missing:
            raise KeyError(missing[0])
        for entry in manifest["files"].values():
            int(entry["bytes"])
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged ({error!r}): copy or download the folder again") from error


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The size in bytes and the SHA-256 of files, by name."""
    entries = {}
    for name in sorted(names):
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries[name] = {"bytes": (folder / name).stat().st_size, "sha256": digest}
    return entries


def combine_hashes(hashes: Mapping[str, str]) -> str:
    """A single SHA-256 for named parts. It does not depend on their order."""
    lines = "".join(f"{name} {value}\n" for name, value in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
