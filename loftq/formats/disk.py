"""Files and folders that are made beside their place and move there when they are complete."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from loftq.errors import OutputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file `.NAME.partial` beside `path`, which takes its place if the block ends without an error.

    After an error it is removed, and `path` is as it was. A run that is killed leaves the file, and the next one
    removes it.
    """
    scratch = path.with_name(f".{path.name}.partial")
    scratch.unlink(missing_ok=True)
    os.close(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less what the umask takes away
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, text in UTF-8, so that a reader finds the old content or the new one, and no part of it."""
    with replacing(path) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)


def is_inside(name: str) -> bool:
    """Whether a file name that is relative to a folder stays in that folder."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


@contextmanager
def scratch_beside(folder: Path, keep: str | None = None) -> Iterator[Path]:
    """A folder `.NAME-partial` that no other run uses: if one does, this waits until it has ended.

    The folder is removed afterwards, unless it then holds a file `keep`, from which the next run continues. The next
    run removes anything else that was left there.
    """
    scratch = folder.parent / f".{folder.name}-partial"
    held = _hold(scratch)
    try:
        if not _holds(scratch, keep):
            for left in scratch.iterdir():
                left.unlink()
        yield scratch
    finally:
        # Where it was moved away, another run may have begun its own there.
        if _is_at(held, scratch) and not _holds(scratch, keep):
            shutil.rmtree(scratch, ignore_errors=True)
        os.close(held)


def _holds(folder: Path, name: str | None) -> bool:
    return name is not None and (folder / name).exists()


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


PARTIAL = ".loftq-partial"
_FAULTS = {  # what is wrong, and what mends it; None where nothing does at this place
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("the disk quota is used up", "free some space"),
    errno.EROFS: ("the file system is read-only", "make it writable"),
    errno.EACCES: ("permission denied", "make it writable"),
    errno.EPERM: ("permission denied", "make it writable"),
    errno.EFBIG: ("a file would be larger than allowed (--overwrite with a smaller --max-shard-size may do)", None),
    errno.ENOTDIR: ("a part of the path is a file", None),
    errno.ENAMETOOLONG: ("the name is too long", None),
}


@contextmanager
def explain_os_errors(output: Path, option: str = "--output") -> Iterator[None]:
    """Turn what the system says of a full or read-only disk into an OutputError with the next step.

    `option` is the one that named the folder.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        if number not in _FAULTS:
            raise
        what, cure = _FAULTS[number]
        if cure is None:
            advice = f"name another {option}"
        elif os.access(output / PARTIAL, os.F_OK):
            advice = f"{cure}, then run again with --resume"
        else:
            advice = f"{cure}, or name another {option}"
        raise OutputError(f"cannot write {output}: {what}: {advice}") from error


def _errno(error: OSError | SafetensorError) -> int | None:
    """The number of what the system said; safetensors writes it into its message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None
