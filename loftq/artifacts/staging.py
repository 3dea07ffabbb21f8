"""The partial folder of an unfinished run, which can be killed at any moment and resumed.

All files are written to `OUTPUT/.loftq-partial/`: the shards, with their bytes reserved, and a journal with a line for
each completed step. A tensor is written first and recorded in the journal afterwards. A resumed run skips the recorded
tensors and writes the others again, with the same bytes. When all files are complete, the journal records that, and the
files are moved to their final places: the weights first, then the index and `config.json`, and `loftq.json` last.
Therefore a folder that loads is complete. The journal shows how far a run has come, so it is removed last.

Each line of the journal is a JSON object of one of these kinds:

    {"fingerprint": {...}}        the first line: everything that the bytes of the result depend on
    {"tensor": NAME, ...}         a tensor is written; the other entries are its record
    {"distilled": {...}}          the adapter is distilled; the entries are the measured values
    {"ready": true}               all files are complete and only have to be moved
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq.errors import ArtifactError, OutputError
from loftq.formats.adapter import FOLDER
from loftq.formats.artifact import MANIFEST
from loftq.formats.checkpoint import INDEX
from loftq.formats.disk import PARTIAL, explain_os_errors, is_inside
from loftq.formats.links import links_below, refuse_links
from loftq.formats.model_files import TEMPLATES, model_file_names
from loftq.formats.schema import json_text, parse_json, read_json
from loftq.settings import plain

_JOURNAL = "journal.jsonl"
_OLD_DISTILLED = "(distilled)"  # older journals have this name among the tensors, instead of a line of its own kind
_LINE = {"fingerprint?": dict, "tensor?": str, "distilled?": dict, "ready?": bool}
_LAST = (INDEX, "config.json", MANIFEST)


def is_begun(output: Path) -> bool:
    """Whether an output folder contains the files of an unfinished run."""
    return (output / PARTIAL / _JOURNAL).is_file()


def check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise OutputError if an output folder exists and must not be overwritten. This is called before any work."""
    with explain_os_errors(output):
        if output.exists() and not output.is_dir():
            raise OutputError(f"{output} is a file: name a folder with --output")
        if output.is_symlink() and not output.exists():
            raise OutputError(f"{output} is a symbolic link to a folder that does not exist: name another --output")
        _check_partial(output)
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
                f"{output} is not empty and not a loftq folder, so it stays unchanged: name another --output"
            )
        if complete and not resume and not overwrite:
            raise OutputError(f"{output} exists already: add --overwrite to make it again, or name another --output")
        if complete:
            # The listed files will be removed, so the list must be valid and not lead out of the folder.
            _refuse_linked(output, [*_listed(manifest), *model_file_names(output)])


@dataclass
class _Journal:
    """The contents of a journal: the records of tensors by name and of the distillation, and whether all is done."""

    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    distilled: dict[str, Any] | None = None
    ready: bool = False


class Staging:
    """The partial folder of one output, locked for this process.

    `done` holds the records of the written tensors; `distilled` is the record of the distillation, None until it is
    done; `ready` is true when all files are complete and only have to be moved.
    """

    def __init__(self, output: Path, descriptor: int, journal: _Journal) -> None:
        self.output = output
        self.folder = output / PARTIAL
        self.done, self.distilled, self.ready = journal.done, journal.distilled, journal.ready
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def note(self, name: str, record: Mapping[str, Any]) -> None:
        """Record in the journal that a tensor is written."""
        with self._lock:
            _append(self._descriptor, {"tensor": name, **record})
            self.done[name] = dict(record)

    def note_distilled(self, record: Mapping[str, Any]) -> None:
        """Record in the journal that the adapter is distilled."""
        with self._lock:
            _append(self._descriptor, {"distilled": dict(record)})
            self.distilled = dict(record)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file into the partial folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def files(self) -> list[str]:
        """The names of all files written so far, relative to the output folder."""
        names = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())
        return sorted(name for name in names if name != _JOURNAL)

    def publish(self) -> None:
        """Move all files to their final places, after removing an older artifact. Can be killed and called again."""
        if not self.ready:
            _append(self._descriptor, {"ready": True})
            self.ready = True
        names = self.files()
        _refuse_linked(self.output, names)
        old_manifest = self.output / MANIFEST
        if (self.folder / MANIFEST).is_file() and old_manifest.is_file():
            _remove_listed(self.output, old_manifest)
            old_manifest.unlink()
        for name in [*(n for n in names if n not in _LAST), *(n for n in _LAST if n in names)]:
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
        _check_partial(output)
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / _JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        try:
            _lock(descriptor, output)
            if overwrite:
                os.ftruncate(descriptor, 0)
            journal = _read_journal(folder / _JOURNAL, fingerprint, output)
            if not journal.done and not journal.ready:
                if (folder / MANIFEST).is_file() and not (output / MANIFEST).is_file():
                    _remove_listed(output, folder / MANIFEST)  # the abandoned run had begun to publish
                _clear(folder)
                os.ftruncate(descriptor, 0)
                _append(descriptor, {"fingerprint": fingerprint})
            yield Staging(output, descriptor, journal)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, output: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(f"another run is writing {output}: wait for it, or name another --output") from error


def _append(descriptor: int, record: Mapping[str, Any]) -> None:
    line = json_text(record).encode() + b"\n"
    while line:  # on an almost full disk, a part may be written
        line = line[os.write(descriptor, line) :]


def _read_journal(path: Path, fingerprint: Mapping[str, Any], output: Path) -> _Journal:
    """Read a journal. Removes the incomplete last line that a killed run may have left."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    os.truncate(path, len(whole))
    records = [record for line in whole.splitlines() if (record := _parse(line))]
    if not records or "fingerprint" not in records[0]:
        return _Journal()
    changed = sorted(_differences(records[0]["fingerprint"], plain(fingerprint)))
    if changed:
        raise OutputError(
            f"{output} holds an unfinished run whose source or settings differ ({', '.join(changed)}): "
            "resume it with the source and settings that it was started with, or add --overwrite to start again"
        )
    done = {record.pop("tensor"): record for record in records if "tensor" in record}
    distilled = done.pop(_OLD_DISTILLED, None)
    for record in records:
        distilled = record.get("distilled", distilled)
    return _Journal(done, distilled, any("ready" in record for record in records))


def _parse(line: bytes) -> dict[str, Any]:
    """A line of the journal. A line that a full disk cut short is returned empty, and its step is done again."""
    try:
        return dict(parse_json(line, _JOURNAL, _LINE))
    except ArtifactError:
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


def _check_partial(output: Path) -> None:
    """Raise OutputError if the partial folder or anything in it is a symbolic link: no run of ours makes one."""
    folder = output / PARTIAL
    links = [PARTIAL] if folder.is_symlink() else [f"{PARTIAL}/{name}" for name in links_below(folder)]
    refuse_links(output, [*links, MANIFEST], OutputError)


def _refuse_linked(output: Path, names: Iterable[str]) -> None:
    """Raise OutputError if a file that is to be removed or written is a symbolic link, or lies in a linked folder."""
    refuse_links(output, [FOLDER, TEMPLATES, *names], OutputError)


def _remove_listed(output: Path, manifest: Path) -> None:
    """Remove the files that a manifest lists. Those that make the folder loadable are removed first."""
    names = ["config.json", INDEX, *_listed(manifest)]
    _refuse_linked(output, names)
    for name in names:
        (output / name).unlink(missing_ok=True)


def _listed(manifest: Path) -> list[str]:
    """The files that a manifest lists. Raises OutputError if it is damaged or lists a file outside its folder."""
    content: dict[str, dict[str, Any]] = read_json(
        manifest, {"files": {str: dict}}, error=OutputError, advice="its folder stays unchanged, name another --output"
    )
    names = list(content["files"])
    outside = [name for name in names if not is_inside(name)]
    if outside:
        raise OutputError(f"{manifest} lists {outside[0]!r}, which lies outside its folder: name another --output")
    return names
