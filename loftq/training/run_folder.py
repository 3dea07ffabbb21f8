"""The folder of a training: its checkpoints, and `training.json` with its settings and, once finished, its results."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import resource
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from loftq.display import one_line
from loftq.errors import ArtifactError, OutputError
from loftq.formats.adapter import CONFIG, WEIGHTS, open_adapter
from loftq.formats.disk import explain_os_errors, write_whole
from loftq.formats.links import links_below, refuse_links
from loftq.formats.model_files import model_file_names
from loftq.formats.schema import finite, json_text, read_json, whole
from loftq.models.adapters import TRAINING_RECORD, TRAINING_SCHEMA
from loftq.training.settings import TrainSettings

_SPLIT = {"batch_size": whole(1), "gradient_accumulation": whole(1), "gradient_checkpointing": bool}

_log = logging.getLogger(__name__)


@contextmanager
def sole_writer(output: Path) -> Iterator[None]:
    """Create the folder of a training, and lock it until the block or the process ends.

    The first of several processes holds the lock for all of them. A folder that stays empty is removed again. Raises
    OutputError if another training writes into the folder, and for a file of its name.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file: name a folder with --output")
    created = [folder for folder in (output, *output.parents) if not folder.exists()]
    with explain_os_errors(output):
        descriptor = _open_folder(output)
    try:
        _lock(descriptor, output)
        yield
    finally:
        for folder in created:
            with suppress(OSError):  # it is not empty
                folder.rmdir()
        os.close(descriptor)


def _open_folder(output: Path) -> int:
    """Create a folder if it is missing, and open it."""
    while True:
        output.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another run removed it because it was empty
            return os.open(output, os.O_RDONLY | os.O_DIRECTORY)


def _lock(descriptor: int, output: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(f"another training is writing {output}: wait for it, or name another --output") from error
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EBADF, errno.ENOLCK, errno.EINVAL):
            raise
        return  # some network file systems have no locks for folders
    if not output.exists() or not os.path.samestat(os.fstat(descriptor), output.stat()):
        raise OutputError(f"another training has just removed {output}: run the same command again")


def check_run_folder(output: Path, settings: TrainSettings, *, resume: bool, overwrite: bool) -> None:
    """Raise OutputError for a folder that cannot be used."""
    if output.is_symlink() and not output.exists():
        raise OutputError(f"{output} is a symbolic link to a folder that does not exist: name another --output")
    refuse_links(output, _own_names(output), OutputError)
    record = _read(output)
    if record is None:
        if output.is_dir() and any(output.iterdir()):
            raise OutputError(f"{output} holds other files: name an empty folder or a new one with --output")
    elif overwrite:
        return
    elif "result" in record:
        raise OutputError(f"{output} holds a finished training: add --overwrite, or name another --output")
    elif not resume:
        raise OutputError(f"{output} holds an unfinished training: add --resume, or --overwrite to start again")
    elif differing := settings.differences(record.get("settings", {})):
        raise OutputError(
            f"{output} was begun with another {', '.join(differing)}: use the same settings again, or add "
            "--overwrite instead of --resume"
        )


def _own_names(output: Path) -> Iterator[str]:
    """The names of the files that a training reads, replaces or removes in its folder, links included."""
    if output.is_dir():
        yield from model_file_names(output)
        for folder in output.glob("checkpoint-*"):
            yield from (folder.name, *(f"{folder.name}/{name}" for name in links_below(folder)))


def check_rows(output: Path, names: Mapping[str, str], hashes: Mapping[str, str]) -> None:
    """Raise OutputError if an unfinished training was begun with other rows. A record without hashes tells nothing.

    `names` are the data as the user named them, and `hashes` those of their rows, by the name of the setting.
    """
    earlier = (_read(output) or {}).get("rows", {})
    for setting, found in hashes.items():
        if earlier.get(setting, found) != found:
            raise OutputError(
                f"{output} was begun with other rows than {names[setting]} holds now: bring back the earlier rows, or "
                "add --overwrite instead of --resume"
            )


def split_before(output: Path) -> dict[str, Any] | None:
    """Batch, accumulation and checkpointing of an unfinished training; None if its record does not hold them."""
    split: dict[str, Any] | None = (_read(output) or {}).get("split")
    return split


def begin(output: Path, record: dict[str, Any]) -> None:
    """Remove the files of an earlier training, and write the record of this one."""
    for path in output.glob("checkpoint-*"):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)
    for name in (WEIGHTS, CONFIG):
        (output / name).unlink(missing_ok=True)
    write_record(output, record)


def write_record(output: Path, record: dict[str, Any]) -> None:
    """Write the record `training.json`, as a whole or not at all. A figure that is not finite is written as null."""
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / TRAINING_RECORD, json_text(finite(record), indent=1, default=str) + "\n")


def _read(output: Path) -> dict[str, Any] | None:
    path = output / TRAINING_RECORD
    if not path.is_file():
        return None
    advice = f"remove {output}, or name another --output"
    schema = TRAINING_SCHEMA | {"settings": dict, "rows?": dict, "split?": _SPLIT}
    record: dict[str, Any] = read_json(path, schema, error=OutputError, advice=advice)
    return record


# Files that torch.save writes: zip archives, whose index is at the end.
_PICKLED = ("optimizer.*", "scheduler.pt", "rng_state*.pth")


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a training, the newest first."""
    folders = [path for path in output.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(folders, key=_step, reverse=True)


def last_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint. With an incomplete one a run would fail, or continue without its optimizer."""
    return next(filter(_is_complete, checkpoints(output)), None)


def give_up_after(last: Path | None, output: Path) -> None:
    """Remove the checkpoints that are newer than the one that a run continues from, and report it."""
    newer = [path for path in checkpoints(output) if last is None or _step(path) > _step(last)]
    for path in newer:
        shutil.rmtree(path)
    if newer:
        names = ", ".join(path.name for path in reversed(newer))
        where = "starts again" if last is None else f"continues from {last.name}"
        _log.warning(f"{output}: {names} is incomplete: training {where}")


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_complete(checkpoint: Path) -> bool:
    try:
        read_json(checkpoint / "trainer_state.json", {"global_step": whole()}, foreign=True)
        open_adapter(checkpoint)
    except (OSError, ArtifactError):
        return False
    return all(_are_archives(checkpoint.glob(pattern)) for pattern in _PICKLED)


def _are_archives(paths: Iterable[Path]) -> bool:
    files = list(paths)
    return bool(files) and all(map(_is_archive, files))


def _is_archive(path: Path) -> bool:
    """Whether a file is a zip archive whose parts have the checksums that it lists for them."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError):
        return False


@contextmanager
def explain_write_errors(output: Path) -> Iterator[None]:
    """Turn an error from writing into the folder of a training into an OutputError with the next step.

    The checkpoint that it left unfinished is removed, so that its space is free and the one before it is the last.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        cause = _write_error(error, output) if isinstance(error, RuntimeError) else error
        if cause is None:
            raise
        if os.environ.get("RANK", "0") == "0":
            for path in checkpoints(output):
                if not _is_complete(path):
                    shutil.rmtree(path, ignore_errors=True)
        try:
            with explain_os_errors(output):
                raise cause
        except OutputError as explained:
            begun = (output / TRAINING_RECORD).is_file()
            resume = ". To continue from the last checkpoint, run again with --resume" if begun else ""
            raise OutputError(f"{explained}{resume}") from error


_TORCH_CANNOT_WRITE = re.compile(r"inline_container|PytorchStreamWriter|file write failed|iostream error")
_PROBE = 2**20  # bytes


def _write_error(error: RuntimeError, output: Path) -> OSError | OutputError | None:
    """The cause of an error of torch.save, which does not tell it; None for any other error."""
    if not _TORCH_CANNOT_WRITE.search(str(error)):
        return None
    probe = output / ".probe.partial"
    try:
        probe.write_bytes(bytes(_PROBE))
    except OSError as cause:
        return cause
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    if resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY:
        return OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return OutputError(f"cannot write a whole checkpoint into {output} ({one_line(error, 200)}): check the disk")
