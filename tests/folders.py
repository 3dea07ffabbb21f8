"""Folders that runs leave: their files by hash, and whether loftq takes one for complete."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

Files = dict[str, str]  # name, relative to the folder, to SHA-256


def hashes(folder: Path) -> Files:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def described(folder: Path, names: Iterable[str]) -> dict[str, dict[str, object]]:
    """The entries of `loftq.json` for files as they are now."""
    contents = {name: (folder / name).read_bytes() for name in sorted(names)}
    return {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}


def opens(folder: Path) -> bool:
    from loftq.errors import ArtifactError
    from loftq.formats.artifact import open_artifact

    try:
        open_artifact(folder)
    except ArtifactError:
        return False
    return True
