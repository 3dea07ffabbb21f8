"""A folder that is made beside another and takes its place at once, by one run at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch_beside(folder: Path, keep: str) -> Iterator[Path]:
    """A folder, `.NAME-partial`, that no other run has: one that has it is waited for.

    It is gone afterwards, unless it holds a file `keep` then: that is for the next run to go on with. Anything else
    that a run left there is removed by the next.
    """
    scratch = folder.parent / f".{folder.name}-partial"
    held = _hold(scratch)
    try:
        if not (scratch / keep).exists():
            for left in scratch.iterdir():
                left.unlink()
        yield scratch
    finally:
        if (
            _is_at(held, scratch) and not (scratch / keep).exists()
        ):  # not moved away: another run may have begun its own there
            shutil.rmtree(scratch, ignore_errors=True)
        os.close(held)


def move_into_place(scratch: Path, folder: Path) -> None:
    """Rename a scratch folder, replacing what is there."""
    if folder.is_dir():
        shutil.rmtree(folder)
    scratch.rename(folder)


def _hold(scratch: Path) -> int:
    """The descriptor of a folder that is made where it is missing, locked until it is closed or its process ends."""
    while True:
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            held = os.open(scratch, os.O_RDONLY)
        except FileNotFoundError:  # moved by the run that had it
            continue
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            if _is_at(held, scratch):
                return held
        except BaseException:
            os.close(held)
            raise
        os.close(held)


def _is_at(held: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(held), path.stat())
    except FileNotFoundError:
        return False
