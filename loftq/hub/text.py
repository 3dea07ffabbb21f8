"""Reads the text to calibrate on from a file, from a data set on the Hub, or from this package."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from textwrap import shorten
from typing import Any

from loftq.errors import OptionError
from loftq.hub.encodings import check_utf8
from loftq.hub.errors import explain_data

DEFAULT = "default"
_TEXTS = (".txt", ".jsonl", ".json")


def is_dataset(source: str) -> bool:
    """Whether the name of a readable text is that of a data set on the Hub."""
    return source != DEFAULT and Path(source).suffix.lower() not in _TEXTS


def public_name(source: str) -> str:
    """The name of a text without the folder that a file lies in."""
    return source if is_dataset(source) else Path(source).name


def read_text(source: str) -> Iterator[str]:
    """Read the documents of a text.

    A .txt file is a single document; a .jsonl or .json file holds a document in each row. `default` is the text that
    this package ships. Any other name is a data set on the Hub, OWNER/NAME[:CONFIG]. Raises OptionError.
    """
    if source == DEFAULT:
        packed = resources.files("loftq.hub").joinpath("data/calibration.txt.gz").read_bytes()
        return iter(gzip.decompress(packed).decode().split("\n\f\n"))
    path = find_text(source)
    if path is None:
        return _column(_hub_rows(source), source)
    try:
        check_utf8(path, f"--calibration {source}: cannot be read as UTF-8 text:")
        if path.suffix.lower() == ".txt":
            return iter([path.read_text(encoding="utf-8-sig")])
    except OSError as error:
        raise OptionError(f"--calibration {source}: cannot be read: {error.strerror}") from error
    return _column(_parse(path, source), source)


def read_records(source: str) -> Iterator[Mapping[str, Any]] | None:
    """Read the rows of a .jsonl or .json file, or of a data set on the Hub; None for a text. Raises OptionError."""
    if source == DEFAULT:
        return None
    path = find_text(source)
    if path is None:
        return _hub_rows(source)
    return None if path.suffix.lower() == ".txt" else (row for row in _parse(path, source) if isinstance(row, Mapping))


def find_text(source: str) -> Path | None:
    """Return the file of a text, or None for the text of this package and for a name that can only be a data set.

    Raises OptionError.
    """
    if source == DEFAULT:
        return None
    option = f"--calibration {shorten(source, 250, placeholder='…')}"
    try:
        path = Path(source).expanduser()
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, RuntimeError) as error:  # a too long name, a missing permission, an unknown user after ~
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"{option}: not a valid name ({reason}): expected a file or a data set on the Hub") from error
    suffix = path.suffix.lower()
    if is_folder:
        raise OptionError(f"{option}: is a folder: name a .txt, .jsonl or .json file in it")
    if exists and suffix not in _TEXTS:
        raise OptionError(f"{option}: expected a .txt, .jsonl or .json file")
    if exists and not os.access(path, os.R_OK):
        raise OptionError(f"{option}: cannot be read: permission denied")
    if not exists and suffix in _TEXTS:
        raise OptionError(f"{option}: no such file")
    if not exists and not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
        raise OptionError(f"{option}: no such file, and not the name of a data set on the Hub (OWNER/NAME[:CONFIG])")
    return path if exists else None


def _parse(path: Path, source: str) -> Iterator[Mapping[str, Any]]:
    """Read the rows of JSON lines, or of a single JSON array."""
    with path.open(encoding="utf-8-sig") as file:
        begun = False
        for number, line in enumerate(file, 1):
            if line.isspace():  # `strip` would copy a long line
                continue
            if not begun and re.match(r"\s*\[", line):
                try:
                    yield from json.loads(line + file.read())
                except (ValueError, RecursionError) as error:
                    raise OptionError(f"--calibration {source}: not JSON ({error})") from error
                return
            begun = True
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise OptionError(f"--calibration {source}: line {number} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise OptionError(f"--calibration {source}: line {number} is not an object with a column `text`")
            yield row


def _column(rows: Iterable[Any], source: str) -> Iterator[str]:
    """Read the text of rows: the column `text`, or else the only column that holds strings."""
    name = None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise OptionError(f"--calibration {source}: row {number} is not an object with a column `text`")
        if name is None:
            strings = [key for key, value in row.items() if isinstance(value, str)]
            if "text" not in strings and len(strings) != 1:
                raise OptionError(
                    f"--calibration {source}: expected a column `text`, or a single column of strings "
                    f"(columns: {', '.join(map(str, row)) or 'none'}): rename the right one to `text`"
                )
            name = "text" if "text" in strings else strings[0]
        if not isinstance(row.get(name), str):
            raise OptionError(f"--calibration {source}: row {number} has no string in its column {name!r}")
        if re.search(r"[\ud800-\udfff]", row[name]):
            raise OptionError(
                f"--calibration {source}: row {number} holds half of a surrogate pair, which is not valid text"
            )
        yield row[name]


def _hub_rows(source: str) -> Iterator[Mapping[str, Any]]:
    """Stream the rows of a data set: of the split `train` if it has one, otherwise of its first split."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise OptionError(
            f"--calibration {source}: no such file; to read a data set on the Hub, pip install 'loftq[data]'"
        ) from error
    name, _, config = source.partition(":")
    with explain_data(name, f"--calibration {source}"):
        splits = load_dataset(name, config or None, streaming=True)
        yield from splits["train" if "train" in splits else next(iter(splits))]
