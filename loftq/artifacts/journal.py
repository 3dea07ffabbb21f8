"""The journal of an unfinished run: which of its steps are done, with hashes of the bytes that they wrote.

Each line is a JSON object of one of these kinds:

    {"fingerprint": {...}}        the first line: everything that the bytes of the result depend on
    {"tensor": NAME, ...}         a tensor is written; the other entries are its record. `written` has the SHA-256 of
                                  each tensor that the step wrote
    {"distilled": {...}}          the adapter is distilled; the entries are the measured values and the
                                  SHA-256 of its file
    {"ready": true}               all files are complete and only have to be moved
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq.errors import ArtifactError, OutputError
from loftq.formats.schema import json_text, parse_json
from loftq.settings import plain

JOURNAL = "journal.jsonl"
_LINE = {"fingerprint?": dict, "tensor?": str, "written?": {str: str}, "distilled?": dict, "ready?": bool}
_OLD_DISTILLED = "(distilled)"  # older journals have this name among the tensors, instead of a line of its own kind


@dataclass
class Journal:
    """The contents of a journal: the records of tensors by name and of the distillation, and whether all is done."""

    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    distilled: dict[str, Any] | None = None
    ready: bool = False


def append(descriptor: int, records: Sequence[Mapping[str, Any]]) -> None:
    """Write lines at the end of a journal, and wait until they are on the disk."""
    lines = b"".join(json_text(record).encode() + b"\n" for record in records)
    while lines:  # on an almost full disk, a part may be written
        lines = lines[os.write(descriptor, lines) :]
    os.fsync(descriptor)


def read_journal(path: Path, fingerprint: Mapping[str, Any], output: Path) -> Journal:
    """Read a journal. Removes the incomplete last line that a killed run may have left."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    os.truncate(path, len(whole))
    records = [record for line in whole.splitlines() if (record := _parse(line))]
    if not records or "fingerprint" not in records[0]:
        return Journal()
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
    return Journal(done, distilled, any("ready" in record for record in records))


def _parse(line: bytes) -> dict[str, Any]:
    """A line of the journal. A line that a full disk cut short is returned empty, and its step is done again."""
    try:
        return dict(parse_json(line, JOURNAL, _LINE))
    except ArtifactError:
        return {}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in {*before, *now}:
        if key in _NEW_KEYS and key not in before:
            continue
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new)
        elif old != new:
            yield f"{key} has changed" if isinstance(old, list) or isinstance(new, list) else f"{key} was {old}"


_NEW_KEYS = ("side_files", "read_files")  # of fingerprints; those of older journals lack them
