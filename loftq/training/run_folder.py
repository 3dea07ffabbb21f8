"""The folder of a training: its checkpoints, and `training.json` with its settings and, once finished, its results."""

from __future__ import annotations

import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loftq.errors import ArtifactError, OutputError
from loftq.formats.adapter import CONFIG, WEIGHTS, open_adapter
from loftq.formats.disk import write_whole
from loftq.formats.links import links_below, refuse_links
from loftq.formats.model_files import model_file_names
from loftq.formats.schema import finite, json_text, read_json, whole
from loftq.models.adapters import TRAINING_RECORD, TRAINING_SCHEMA
from loftq.planning.run import check_resume
from loftq.training.settings import TrainSettings


def check_run_folder(output: Path, settings: TrainSettings, *, resume: bool, overwrite: bool) -> None:
    """Raise OutputError for a folder that cannot be used, and OptionError for options that contradict each other."""
    check_resume(resume, overwrite)
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file: name a folder with --output")
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


def begin(output: Path, settings: TrainSettings, backbone: Mapping[str, str]) -> None:
    """Remove the files of an earlier training, and write the settings and the backbone of this one."""
    for folder in output.glob("checkpoint-*"):
        shutil.rmtree(folder)
    for name in (WEIGHTS, CONFIG):
        (output / name).unlink(missing_ok=True)
    write_record(output, {"settings": settings.to_dict(), "backbone": backbone})


def write_record(output: Path, record: dict[str, Any]) -> None:
    """Write the record `training.json`, as a whole or not at all."""
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / TRAINING_RECORD, json_text(finite(record), indent=1, default=str) + "\n")


def _read(output: Path) -> dict[str, Any] | None:
    path = output / TRAINING_RECORD
    if not path.is_file():
        return None
    advice = f"remove {output}, or name another --output"
    record: dict[str, Any] = read_json(path, TRAINING_SCHEMA | {"settings": dict}, error=OutputError, advice=advice)
    return record


# Files that torch.save writes: zip archives, whose index is at the end.
_PICKLED = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a training, the newest first."""
    folders = [path for path in output.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(folders, key=_step, reverse=True)


def last_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint. With an incomplete one a run would fail, or continue without its optimizer."""
    return next(filter(_is_complete, checkpoints(output)), None)


def give_up_after(last: Path | None, output: Path) -> None:
    """Remove the checkpoints that are newer than the one that a run continues from, and report it on stderr."""
    newer = [path for path in checkpoints(output) if last is None or _step(path) > _step(last)]
    for path in newer:
        shutil.rmtree(path)
    if newer:
        names = ", ".join(path.name for path in reversed(newer))
        where = "starts again" if last is None else f"continues from {last.name}"
        print(f"{output}: {names} is incomplete: training {where}", file=sys.stderr, flush=True)


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
    return bool(files) and all(map(zipfile.is_zipfile, files))
