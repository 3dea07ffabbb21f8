"""Free space on a disk, which is compared with the plan of a run before any work."""

from __future__ import annotations

import shutil
from pathlib import Path

from loftq.display import size
from loftq.errors import OutputError
from loftq.formats.disk import PARTIAL


def check_space(output: Path, needed: int, option: str = "--output", unfinished: Path | None = None) -> None:
    """Raise OutputError if the disk of a folder, which need not exist yet, has less than `needed` bytes free.

    The bytes that an unfinished run has written already, into this folder or into `unfinished`, count as free. `option`
    names the folder.
    """
    free = free_bytes(output) + _written(unfinished or output / PARTIAL)
    if free < needed:
        raise OutputError(
            f"cannot write {output}: the disk is too full: {size(needed)} are needed and {size(free)} are free: "
            f"free some space, or name another {option}"
        )


def free_bytes(folder: Path) -> int:
    """The free bytes of the disk on which a folder lies, or would be created."""
    folder = folder.expanduser().absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free


def _written(folder: Path) -> int:
    """The bytes that the files below a folder take on the disk."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*")) if folder.is_dir() else 0
