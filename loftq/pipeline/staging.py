"""Where an unfinished run keeps its files, so that it can be killed at any moment and resumed.

All files are made inside `OUTPUT/.loftq-partial/`: the shards, with their bytes reserved, and a journal with
a line for each tensor that is in place. A tensor is written, then noted; on resuming, what is noted is done
and the rest is written again, with the same bytes. When everything is there a marker says so, and the files
are moved to their names, `config.json` and the index after the weights, `loftq.json` last: a folder that
loads is complete.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loftq.errors import OutputError
from loftq.formats.artifact import MANIFEST
from loftq.formats.checkpoint import INDEX

PARTIAL = ".loftq-partial"
_JOURNAL = "journal.jsonl"
_READY = "ready"
_LAST = (INDEX, "config.json", MANIFEST)


def check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output that is in the way. Reads names only. Raises OutputError."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file: name a folder with --output")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if (output / PARTIAL).is_dir():
        if not resume and not overwrite:
            done = max(_count_lines(output / PARTIAL / _JOURNAL) - 1, 0)
            raise OutputError(
                f"{output} holds an unfinished run ({done} tensors done): "
                "add --resume to finish it, or --overwrite to start again"
            )
        return
    if not (output / MANIFEST).is_file():
        raise OutputError(
            f"{output} is not empty and not a loftq folder: it will not be touched, name another --output"
        )
    if not resume and not overwrite:
        raise OutputError(f"{output} is there already: add --overwrite to make it again, or name another --output")


class Staging:
    """The partial folder of one output, locked for this process."""

    def __init__(self, output: Path, done: dict[str, dict[str, Any]], journal: int) -> None:
        self.output = output
        self.folder = output / PARTIAL
        self.done = done
        self._journal = journal
        self._lock = threading.Lock()

    @property
    def ready(self) -> bool:
        """Whether everything has been made and only the moving is left."""
        return (self.folder / _READY).is_file()

    def note(self, name: str, record: Mapping[str, Any]) -> None:
        """Note that a tensor is in place."""
        line = json.dumps({"tensor": name, **record}) + "\n"
        with self._lock:
            os.write(self._journal, line.encode())
            self.done[name] = dict(record)

    def write_text(self, name: str, text: str) -> None:
        """Make a small file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def files(self) -> list[str]:
        """Names, relative to the output, of all files made so far."""
        own = {_JOURNAL, _READY}
        found = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())
        return sorted(name for name in found if name not in own)

    def publish(self) -> None:
        """Move everything into place, removing an older artifact first. May be killed and called again."""
        (self.folder / _READY).touch()
        if (self.folder / MANIFEST).is_file():
            _remove_artifact(self.output)
        waiting = self.files()
        for name in [*(n for n in waiting if n not in _LAST), *(n for n in _LAST if n in waiting)]:
            target = self.output / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).replace(target)
        shutil.rmtree(self.folder)


@contextmanager
def open_staging(output: Path, fingerprint: Mapping[str, Any], *, overwrite: bool) -> Iterator[Staging]:
    """Create the partial folder, or reopen the one of a run with the same fingerprint."""
    folder = output / PARTIAL
    with explain_os_errors(output):
        folder.mkdir(parents=True, exist_ok=True)
        journal = os.open(folder / _JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(f"another run is writing {output}: wait for it, or name another --output") from error
        done: dict[str, dict[str, Any]] = {}
        if not overwrite:
            done = _read_journal(folder / _JOURNAL, fingerprint, output)
        if not done and not (folder / _READY).is_file():
            _clear(folder)
            os.ftruncate(journal, 0)
            os.write(journal, (json.dumps({"fingerprint": fingerprint}) + "\n").encode())
        with explain_os_errors(output):
            yield Staging(output, done, journal)
    finally:
        os.close(journal)


@contextmanager
def explain_os_errors(output: Path) -> Iterator[None]:
    """Turn what the system says of a full or read-only disk into an OutputError with the next step."""
    try:
        yield
    except OSError as error:
        reason = {
            errno.ENOSPC: "the disk is full: free some space",
            errno.EDQUOT: "the disk quota is used up: free some space",
            errno.EFBIG: "a file would be larger than allowed: use a smaller --max-shard-size",
            errno.EROFS: "the file system is read-only",
            errno.EACCES: "permission denied",
            errno.EPERM: "permission denied",
            errno.ENOTDIR: "a part of the path is a file",
        }.get(error.errno or 0)
        if reason is None:
            raise
        after = ", then run again with --resume" if (output / PARTIAL).is_dir() else ", or name another --output"
        raise OutputError(f"cannot write {output}: {reason}{after}") from error


def _read_journal(path: Path, fingerprint: Mapping[str, Any], output: Path) -> dict[str, dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was cut off by the kill
    if not lines:
        return {}
    before = json.loads(lines[0])["fingerprint"]
    now = json.loads(json.dumps(fingerprint))
    changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if changed:
        raise OutputError(
            f"{output} holds an unfinished run with another {', '.join(changed)}: "
            "resume it with the settings it was begun with, or add --overwrite to start again"
        )
    records = [json.loads(line) for line in lines[1:]]
    return {record.pop("tensor"): record for record in records}


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _JOURNAL:
            path.unlink()


def _remove_artifact(output: Path) -> None:
    manifest = output / MANIFEST
    if not manifest.is_file():
        return
    listed = json.loads(manifest.read_text(encoding="utf-8")).get("files", {})
    for name in ["config.json", INDEX, *listed]:  # what makes it loadable goes first
        (output / name).unlink(missing_ok=True)
    manifest.unlink()


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0
