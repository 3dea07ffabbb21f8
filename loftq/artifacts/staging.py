"""Where an unfinished run keeps its files, so that it can be killed at any moment and resumed.

All files are made inside `OUTPUT/.loftq-partial/`: the shards, with their bytes reserved, and a journal with
a line for each step that is done. A tensor is written, then noted; on resuming, what is noted is done
and the rest is written again, with the same bytes. When everything is there the journal says so, and the files
are moved to their names, `config.json` and the index after the weights, `loftq.json` last: a folder that
loads is complete. The journal alone tells how far a run has come, so it is the last to go.

Each line of the journal is a JSON object of one kind:

    {"fingerprint": {...}}        the first line: all that the bytes of the result depend on
    {"tensor": NAME, ...}         a tensor is in place, with what is known of it
    {"distilled": {...}}          the adapter is distilled, with what that measured
    {"ready": true}               everything is made, and only the moving is left
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq.errors import OutputError
from loftq.formats.artifact import MANIFEST
from loftq.formats.checkpoint import INDEX
from loftq.formats.disk import PARTIAL, explain_os_errors, is_inside

_JOURNAL = "journal.jsonl"
_OLD_DISTILLED = "(distilled)"  # journals had this among the names of tensors, before it was a kind of its own
_LAST = (INDEX, "config.json", MANIFEST)


def is_begun(output: Path) -> bool:
    """Whether an unfinished run has left its files here."""
    return (output / PARTIAL / _JOURNAL).is_file()


def check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output that is in the way, before any work. Raises OutputError."""
    with explain_os_errors(output):
        if output.exists() and not output.is_dir():
            raise OutputError(f"{output} is a file: name a folder with --output")
        manifest = output / MANIFEST
        begun, complete = is_begun(output), manifest.is_file()
        if begun and not resume and not overwrite:
            done = (output / PARTIAL / _JOURNAL).read_bytes().count(b'\n{"tensor":')
            raise OutputError(
                f"{output} holds an unfinished run ({done} tensors done): "
                "add --resume to finish it, or --overwrite to start again"
            )
        if not begun and not complete and output.is_dir() and any(p.name != PARTIAL for p in output.iterdir()):
            raise OutputError(
                f"{output} is not empty and not a loftq folder: it will not be touched, name another --output"
            )
        if complete and not resume and not overwrite:
            raise OutputError(f"{output} is there already: add --overwrite to make it again, or name another --output")
        if complete:
            _listed(manifest)  # what it lists will be removed


@dataclass
class _Noted:
    """What a journal says: the records of tensors by name, that of the distillation, and whether all is made."""

    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    distilled: dict[str, Any] | None = None
    ready: bool = False


class Staging:
    """The partial folder of one output, locked for this process.

    `done` holds the records of the tensors in place; `distilled` is the record of the distillation, None until it is
    done; `ready` says that all is made and only the moving is left.
    """

    def __init__(self, output: Path, journal: int, noted: _Noted) -> None:
        self.output = output
        self.folder = output / PARTIAL
        self.done, self.distilled, self.ready = noted.done, noted.distilled, noted.ready
        self._journal = journal
        self._lock = threading.Lock()

    def note(self, name: str, record: Mapping[str, Any]) -> None:
        """Note that a tensor is in place."""
        with self._lock:
            _append(self._journal, {"tensor": name, **record})
            self.done[name] = dict(record)

    def note_distilled(self, record: Mapping[str, Any]) -> None:
        """Note that the adapter is distilled."""
        with self._lock:
            _append(self._journal, {"distilled": dict(record)})
            self.distilled = dict(record)

    def write_text(self, name: str, text: str) -> None:
        """Make a small file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def files(self) -> list[str]:
        """Names, relative to the output, of all files made so far."""
        found = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())
        return sorted(name for name in found if name != _JOURNAL)

    def publish(self) -> None:
        """Move everything into place, removing an older artifact first. May be killed and called again."""
        if not self.ready:
            _append(self._journal, {"ready": True})
            self.ready = True
        older = self.output / MANIFEST
        if (self.folder / MANIFEST).is_file() and older.is_file():
            _remove_listed(self.output, older)
            older.unlink()
        waiting = self.files()
        for name in [*(n for n in waiting if n not in _LAST), *(n for n in _LAST if n in waiting)]:
            target = self.output / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).replace(target)
        _clear(self.folder)
        (self.folder / _JOURNAL).unlink()
        self.folder.rmdir()


@contextmanager
def open_staging(output: Path, fingerprint: Mapping[str, Any], *, overwrite: bool) -> Iterator[Staging]:
    """Create the partial folder, or reopen the one of a run with the same fingerprint."""
    folder = output / PARTIAL
    with explain_os_errors(output):
        folder.mkdir(parents=True, exist_ok=True)
        journal = os.open(folder / _JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _lock(journal, output)
            if overwrite:
                os.ftruncate(journal, 0)
            noted = _read_journal(folder / _JOURNAL, fingerprint, output)
            if not noted.done and not noted.ready:
                if (folder / MANIFEST).is_file() and not (output / MANIFEST).is_file():
                    _remove_listed(output, folder / MANIFEST)  # the run that is given up had begun to publish
                _clear(folder)
                os.ftruncate(journal, 0)
                _append(journal, {"fingerprint": fingerprint})
            yield Staging(output, journal, noted)
        finally:
            os.close(journal)


def _lock(journal: int, output: Path) -> None:
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(f"another run is writing {output}: wait for it, or name another --output") from error


def _append(journal: int, record: Mapping[str, Any]) -> None:
    line = json.dumps(record).encode() + b"\n"
    while line:  # a disk that is almost full takes a part of it
        line = line[os.write(journal, line) :]


def _read_journal(path: Path, fingerprint: Mapping[str, Any], output: Path) -> _Noted:
    """What is noted. Cuts off the part of a line that a killed run left."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    os.truncate(path, len(whole))
    records = [record for line in whole.splitlines() if (record := _parse(line))]
    if not records or "fingerprint" not in records[0]:
        return _Noted()
    changed = sorted(_differences(records[0]["fingerprint"], json.loads(json.dumps(fingerprint))))
    if changed:
        raise OutputError(
            f"{output} holds an unfinished run with another source or other settings ({', '.join(changed)}): "
            "resume it with those it was begun with, or add --overwrite to start again"
        )
    done = {record.pop("tensor"): record for record in records if "tensor" in record}
    distilled = done.pop(_OLD_DISTILLED, None)
    for record in records:
        distilled = record.get("distilled", distilled)
    return _Noted(done, distilled, any("ready" in record for record in records))


def _parse(line: bytes) -> dict[str, Any]:
    """A line of the journal; empty for one that a full disk cut short: what it noted is made again."""
    try:
        return dict(json.loads(line))
    except ValueError:
        return {}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in {*before, *now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new)
        elif old != new:
            yield f"{key} has changed" if isinstance(old, list) else f"{key} was {old}"


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _JOURNAL:
            path.unlink()


def _remove_listed(output: Path, manifest: Path) -> None:
    """Remove the files that a manifest lists, what makes the folder loadable first."""
    for name in ["config.json", INDEX, *_listed(manifest)]:
        (output / name).unlink(missing_ok=True)


def _listed(manifest: Path) -> list[str]:
    """The files that a manifest lists. Raises OutputError where it is damaged, or lists any outside its folder."""
    try:
        names = [str(name) for name in json.loads(manifest.read_text(encoding="utf-8"))["files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{manifest} is damaged: its folder will not be touched, name another --output") from error
    outside = [name for name in names if not is_inside(name)]
    if outside:
        raise OutputError(f"{manifest} lists {outside[0]!r}, which lies outside its folder: name another --output")
    return names
