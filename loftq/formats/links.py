"""Symbolic links in folders of models and outputs, which are never followed out of the folder.

Whoever writes a folder decides where its links lead: a link `x.txt -> /proc/self/environ` in a model's folder would
bring the user's tokens into the output. Two rules follow from this. In the folder of a model that loftq did not write,
a file may be a link if the target lies in the same folder (`refuse_outside`). A folder that loftq writes, and later
reads, replaces or publishes, contains no links (`refuse_links`).

The cache of the Hub is an exception to both rules. In it, `REPO/snapshots/COMMIT/NAME` is a link to `REPO/blobs/ETAG`,
which may be a link to a file in the store `blobs/` that all repositories of the cache share.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from loftq.errors import CheckpointError, LoftQError


def refuse_links(folder: Path, names: Iterable[str], error: type[LoftQError]) -> None:
    """Raise `error` if one of the named files of a folder, or a folder above it, is a symbolic link."""
    for name in names:
        link = linked_part(folder, name)
        if link is not None:
            raise error(
                f"{link} is a symbolic link to {link.readlink()}, and links are not followed: "
                "put a copy of the file or folder in its place, or remove the link"
            )


def refuse_outside(folder: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError if one of the named files of a model's folder is a link out of the folder."""
    roots = [Path(os.path.realpath(folder)), *_blobs(folder)]
    for name in names:
        path = folder / name
        target = Path(os.path.realpath(path))
        if os.path.lexists(path) and not any(target.is_relative_to(root) for root in roots):
            raise CheckpointError(
                f"{path} is a symbolic link to {target}, which lies outside the model's folder: "
                "put a copy of the file in its place, or remove the link"
            )


def linked_part(folder: Path, name: str) -> Path | None:
    """The first symbolic link on the way from a folder, which may itself be a link, to a file below it."""
    path = folder
    for part in Path(name).parts:
        path = path / part
        if path.is_symlink() and not is_of_the_cache(folder, path):
            return path
    return None


def is_of_the_cache(folder: Path, link: Path) -> bool:
    """Whether a link in a folder of the Hub's cache leads to a file of this cache, as the Hub's client makes them."""
    target = Path(os.path.realpath(link))
    return target.is_file() and any(target.is_relative_to(root) for root in _blobs(folder))


def links_below(folder: Path) -> Iterator[str]:
    """The names of all symbolic links in a folder and its subfolders, except those of the Hub's cache."""
    for above, folders, files in os.walk(folder):
        for name in sorted([*folders, *files]):
            path = Path(above, name)
            if path.is_symlink() and not is_of_the_cache(folder, path):
                yield path.relative_to(folder).as_posix()


def _blobs(folder: Path) -> Collection[Path]:
    """The folders of files of the Hub's cache that links in a snapshot lead to. None if the folder is no snapshot."""
    path = Path(os.path.realpath(folder))
    for snapshot in (path, *path.parents):
        repo = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and (repo / "blobs").is_dir():
            shared = repo.parent / "blobs"
            is_shared = (shared / ".huggingface-shared-blobs").is_file()
            return [root for root in (repo / "blobs", *([shared] if is_shared else [])) if not root.is_symlink()]
    return []
