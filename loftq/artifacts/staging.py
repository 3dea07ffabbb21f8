"""The partial folder of an unfinished run, which can be killed at any moment and resumed.

All files are written to `OUTPUT/.loftq-partial/`: the shards, with their bytes reserved, and a journal of the completed
steps (`loftq.artifacts.journal`). The bytes of a tensor reach the disk first and its line in the journal afterwards,
so that this also holds after a power cut. A resumed run reads the recorded tensors again. It skips those whose bytes
have the recorded hash and writes the others again, with the same bytes.

When all files are complete and on the disk, the journal records that, and the files are moved to their final places:
the weights first, then the index and `config.json`, and `loftq.json` last. Therefore a folder that loads is complete.
Only the files that `loftq.json` lists are moved. The journal shows how far a run has come, so it is removed last.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loftq.artifacts.journal import JOURNAL, Journal, append, read_journal
from loftq.artifacts.written import Description, describe, is_written, listed_difference
from loftq.errors import OutputError
from loftq.formats.adapter import FOLDER
from loftq.formats.artifact import MANIFEST
from loftq.formats.checkpoint import INDEX, Shard
from loftq.formats.disk import PARTIAL, explain_os_errors, is_inside, make_folder, replacing, sync
from loftq.formats.links import links_below, refuse_links
from loftq.formats.model_files import TEMPLATES, model_file_names
from loftq.formats.scan import hash_of
from loftq.formats.schema import read_json, whole
from loftq.formats.shard_writer import ShardWriter

_FILES = {"files": {str: {"bytes": whole(), "sha256?": str}}}  # the part of `loftq.json` that a move needs
EVERY = 1.0  # seconds between two waits for the disk; a power cut costs at most the work of this time
_LAST = (INDEX, "config.json", MANIFEST)


def is_begun(output: Path) -> bool:
    """Whether an output folder contains the files of an unfinished run."""
    return (output / PARTIAL / JOURNAL).is_file()


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
            done = (output / PARTIAL / JOURNAL).read_bytes().count(b'\n{"tensor":')
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


class Staging:
    """The partial folder of one output, locked for this process.

    `done` holds the records of the written tensors; `distilled` is the record of the distillation, None until it is
    done; `ready` is true when all files are complete and only have to be moved. `shards` are the planned files of
    tensors. `hashes` are the SHA-256 of files that were written as a whole, by name; None if it is not known.
    """

    def __init__(self, output: Path, descriptor: int, journal: Journal) -> None:
        self.output = output
        self.folder = output / PARTIAL
        self.done, self.distilled, self.ready = journal.done, journal.distilled, journal.ready
        self.shards: tuple[Shard, ...] = ()
        self.hashes: dict[str, str | None] = {}
        self._descriptor = descriptor
        self._pending: list[dict[str, Any]] = []  # lines of the journal whose tensors may not be on the disk yet
        self._lock, self._flushing = threading.Lock(), threading.Lock()
        self._last = time.monotonic()
        self._error: OSError | None = None
        self._sync: Callable[[], None] | None = None

    @contextmanager
    def writing(self, shards: Sequence[Shard]) -> Iterator[ShardWriter]:
        """Open the planned shards. Forgets the recorded tensors whose bytes are not there, so they are written again.

        Files that have an entry in `hashes` are complete, and stay as they are.
        """
        self.shards = tuple(shards)
        with ShardWriter(self.folder, shards, kept=dict(self.hashes)) as writer:
            for name in [name for name, record in self.done.items() if not is_written(writer, record)]:
                del self.done[name]
            self._sync, ended = writer.sync, threading.Event()
            flusher = threading.Thread(target=self._flush_often, args=(ended,), name="loftq-journal", daemon=True)
            flusher.start()
            try:
                yield writer
            except BaseException:
                with suppress(OSError):  # the error that ended the run matters more
                    self.flush()
                raise
            finally:
                ended.set()
                flusher.join()
            self.flush()

    def note(self, name: str, record: Mapping[str, Any]) -> None:
        """Record in the journal that a tensor is written. The line is written together with others, by `flush`.

        `record["written"]` has the SHA-256 of each tensor that this step wrote.
        """
        with self._lock:
            self.done[name] = dict(record)
            self._pending.append({"tensor": name, **record})
        if time.monotonic() - self._last >= EVERY:
            self.flush()

    def flush(self) -> None:
        """Wait until all written tensors are on the disk, and then write their lines of the journal.

        After a failure nobody knows which bytes are lost, so nothing more is recorded: the same error is raised again.
        """
        with self._flushing:
            if self._error is not None:
                raise self._error
            with self._lock:
                pending, self._pending = self._pending, []
            if not pending:
                return
            try:
                if self._sync is not None:
                    self._sync()
                append(self._descriptor, pending)
            except OSError as error:
                self._error = error
                raise
            self._last = time.monotonic()

    def _flush_often(self, ended: threading.Event) -> None:
        """Record what is written, also while a step takes long. An error is raised in the thread of the next step."""
        while not ended.wait(1.0):
            with suppress(OSError):
                self.flush()

    def note_distilled(self, record: Mapping[str, Any]) -> None:
        """Record in the journal that the adapter is distilled. Its file is on the disk already."""
        self.flush()
        append(self._descriptor, [{"distilled": dict(record)}])
        self.distilled = dict(record)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file into the partial folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        self.hashes[name] = hashlib.sha256(text.encode()).hexdigest()

    def copy(self, source: Path, name: str) -> None:
        """Copy a file into the partial folder, under a name. Its permissions follow the umask."""
        self.hashes[name] = hash_of(source)
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / name) as scratch:
            shutil.copyfile(source, scratch)

    def describe(self) -> Description:
        """Read all planned files once. Raises OutputError if one is missing or is not what was written."""
        return describe(self.folder, self.shards, self.hashes, self.done)

    def publish(self) -> None:
        """Move all files to their final places, after removing an older artifact. Can be killed and called again."""
        again = f"add --overwrite instead of --resume to make {self.output} again"
        manifest = next((path for path in (self.folder / MANIFEST, self.output / MANIFEST) if path.is_file()), None)
        if manifest is None:
            raise OutputError(f"{self.folder / MANIFEST} is missing: {again}")
        names = [*_listed(manifest), MANIFEST]
        if self.ready:
            self._check_ready(manifest, again)
        else:
            for path in {self.folder / name for name in names} | {(self.folder / name).parent for name in names}:
                sync(path)
            append(self._descriptor, [{"ready": True}])
            self.ready = True
        _refuse_linked(self.output, names)
        old_manifest = self.output / MANIFEST
        if (self.folder / MANIFEST).is_file() and old_manifest.is_file():
            _remove_listed(self.output, old_manifest)
            old_manifest.unlink()
            sync(self.output)
        self._move([name for name in names if name not in _LAST])
        self._move([name for name in _LAST if name in names and name != MANIFEST])
        self._move([MANIFEST])
        _clear(self.folder)
        (self.folder / JOURNAL).unlink()
        self.folder.rmdir()
        sync(self.output)

    def _move(self, names: Sequence[str]) -> None:
        """Move files to their final places, where they have not been moved yet, and make that durable."""
        for name in names:
            if (self.folder / name).is_file():
                make_folder((self.output / name).parent)
                (self.folder / name).replace(self.output / name)
        for folder in {(self.output / name).parent for name in names}:
            sync(folder)

    def _check_ready(self, manifest: Path, again: str) -> None:
        """Raise OutputError unless all files that are being moved are those that `loftq.json` lists."""
        for name, entry in read_json(manifest, _FILES, error=OutputError)["files"].items():
            folder = self.folder if (self.folder / name).is_file() else self.output
            difference = listed_difference(folder, name, entry)
            if difference is not None:
                raise OutputError(f"{folder / name} {difference}, but it was complete before: {again}")


@contextmanager
def open_staging(output: Path, fingerprint: Mapping[str, Any], *, overwrite: bool) -> Iterator[Staging]:
    """Create the partial folder, or reopen the one of a run with the same fingerprint."""
    folder = output / PARTIAL
    with explain_os_errors(output):
        _check_partial(output)
        make_folder(folder)
        descriptor = os.open(folder / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        try:
            _lock(descriptor, output)
            if overwrite:
                os.ftruncate(descriptor, 0)
            journal = read_journal(folder / JOURNAL, fingerprint, output)
            if not journal.done and not journal.ready:
                if (folder / MANIFEST).is_file() and not (output / MANIFEST).is_file():
                    _remove_listed(output, folder / MANIFEST)  # the abandoned run had begun to publish
                _clear(folder)
                os.ftruncate(descriptor, 0)
                append(descriptor, [{"fingerprint": fingerprint}])
                sync(folder)
            yield Staging(output, descriptor, journal)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, output: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(f"another run is writing {output}: wait for it, or name another --output") from error


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != JOURNAL:
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
