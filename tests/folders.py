"""Folders that runs leave: their files by hash, and whether loftq takes one for complete."""

from __future__ import annotations

import hashlib
from pathlib import Path

Files = dict[str, str]  # name, relative to the folder, to SHA-256


def hashes(folder: Path) -> Files:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def opens(folder: Path) -> bool:
    from loftq.errors import ArtifactError
    from loftq.formats.artifact import open_artifact

    try:
        open_artifact(folder)
    except ArtifactError:
        return False
    return True
