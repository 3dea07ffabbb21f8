"""Files and folders that are written under a temporary name, and renamed when they are complete."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from loftq.errors import OutputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Create an empty file `.NAME.partial` beside `path`, which replaces `path` if the block ends without an error.

    After an error it is removed, and `path` is unchanged. If the process is killed, the file stays, and the next run
    removes it.
    """
    scratch = path.with_name(f".{path.name}.partial")
    mode = _create(scratch)
    try:
        yield scratch
        scratch.chmod(mode)  # whoever wrote the file may have made it anew
        sync(scratch)
        scratch.replace(path)
        sync(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def follow_umask(folder: Path) -> None:
    """Give the safetensors files below a folder the permissions that the umask gives to a new file.

    safetensors writes a file under a temporary name, which only its owner can read.
    """
    probe = folder / ".permissions.partial"
    mode = _create(probe)
    probe.unlink()
    for path in folder.rglob("*.safetensors"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _create(path: Path) -> int:
    """Create an empty file in the place of an older one, never through a link, and return its permissions."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)  # the umask applies
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    return mode


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file (text in UTF-8) so that a reader sees either the old content or all of the new one."""
    with replacing(path) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's list of names, are on the disk and survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no such call for folders. They keep the names in order by themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder and the missing ones above it, so that all of them survive a power cut."""
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in created:
        sync(folder.parent)


def sync_tree(folder: Path) -> None:
    """`sync` a folder with all files and folders in it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def is_inside(name: str) -> bool:
    """Whether a file name relative to a folder stays inside that folder, however a system or a library reads it."""
    parts = Path(name).parts
    return bool(parts) and not Path(name).is_absolute() and ".." not in parts and not set(name) & {"\\", "\0"}


@contextmanager
def scratch_beside(folder: Path, keep: str | None = None) -> Iterator[Path]:
    """Create a folder `.NAME-partial` that no other run uses. If another run uses it, wait until that has ended.

    The folder is removed afterwards, unless it contains a file `keep`, from which the next run continues. Without that
    file, the next run removes everything that it finds in the folder. Raises OutputError if either folder is a link.
    """
    if folder.is_symlink():
        raise OutputError(f"{folder} is a symbolic link, and links are not replaced: name the folder that it leads to")
    scratch = folder.parent / f".{folder.name}-partial"
    descriptor = _lock_folder(scratch)
    try:
        if not _contains(scratch, keep):
            for path in scratch.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        yield scratch
    finally:
        # If the folder was renamed, another run may have created a new one with its old name.
        if _is_at(descriptor, scratch) and not _contains(scratch, keep):
            shutil.rmtree(scratch, ignore_errors=True)
        os.close(descriptor)


def _contains(folder: Path, name: str | None) -> bool:
    """Whether a scratch folder contains a file to continue from. If it contains links, no run of ours wrote it."""
    return name is not None and (folder / name).exists() and not any(path.is_symlink() for path in folder.rglob("*"))


def move_into_place(scratch: Path, folder: Path) -> None:
    """Rename a scratch folder to `folder`, and replace a folder of that name. Its files are on the disk before that."""
    follow_umask(scratch)
    sync_tree(scratch)
    if folder.is_dir():
        shutil.rmtree(folder)
    scratch.rename(folder)
    sync(folder.parent)


def _lock_folder(scratch: Path) -> int:
    """Create a folder if it is missing, and lock it until the returned descriptor is closed or the process ends."""
    while True:
        if scratch.is_symlink():
            raise OutputError(f"{scratch} is a symbolic link, not a folder that loftq made: remove the link")
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # the run that had locked it has renamed it
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, scratch):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


PARTIAL = ".loftq-partial"
_FAULTS = {  # the problem, and its remedy; None if only another output folder helps
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("the disk quota is used up", "free some space"),
    errno.EROFS: ("the file system is read-only", "make it writable"),
    errno.EACCES: ("permission denied", "make it writable"),
    errno.EPERM: ("permission denied", "make it writable"),
    errno.EFBIG: ("a file would be larger than allowed (--overwrite with a smaller --max-shard-size may help)", None),
    errno.ENOTDIR: ("a part of the path is a file", None),
    errno.ENAMETOOLONG: ("the name is too long", None),
    errno.ELOOP: ("a part of the path is a symbolic link", None),
    errno.EIO: ("the disk failed to read or write (input/output error)", "check the disk and its connection"),
    errno.ESTALE: ("the network file system has lost the folder", "mount it again"),
    errno.EMFILE: ("too many files are open in this process", "raise the limit with `ulimit -n 65536`"),
    errno.ENFILE: ("too many files are open on this machine", "close other programs"),
    errno.ENOMEM: ("the memory of the machine is full", "close other programs"),
}
_OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # another folder does not help


@contextmanager
def explain_os_errors(output: Path, option: str = "--output", action: str = "write") -> Iterator[None]:
    """Turn a system error about a full or read-only disk, or a limit, into an OutputError with the next step.

    `option` is the option that names the folder, `action` is what was done with it.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        if number == errno.ENOENT and _is_under(output, error):
            name = Path(str(getattr(error, "filename", output))).name
            raise OutputError(
                f"cannot {action} {output}: {name} was removed during the run: run the same command again"
            ) from error
        if number not in _FAULTS:
            raise
        problem, remedy = _FAULTS[number]
        if remedy is None:
            advice = f"name another {option}"
        elif action == "write" and os.access(output / PARTIAL, os.F_OK):
            advice = f"{remedy}, then run again with --resume"
        elif action == "write" and number not in _OF_THE_MACHINE:
            advice = f"{remedy}, or name another {option}"
        else:
            advice = f"{remedy}, then run the same command again"
        raise OutputError(f"cannot {action} {output}: {problem}: {advice}") from error


def _is_under(folder: Path, error: OSError | SafetensorError) -> bool:
    """Whether an error names a file that lies in a folder."""
    name = getattr(error, "filename", None)
    return isinstance(name, (str, os.PathLike)) and Path(name).absolute().is_relative_to(folder.absolute())


def _errno(error: OSError | SafetensorError) -> int | None:
    """The number of a system error. safetensors writes it into its message."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"os error (\d+)", str(error))
    return int(match[1]) if match else None
