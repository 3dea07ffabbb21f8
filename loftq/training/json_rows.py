"""Checks the rows of a JSON file before a reader gets them, which would crash, or would not name the line.

A file holds an object on each line, or any objects one after another, or an array of objects or of texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loftq.errors import OptionError

_DEEPEST = 60  # lists and objects inside each other; Arrow has no more than 63
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_ARRAY = re.compile(r"\s*\[")
_ESCAPED = re.compile(r"\\ud[89a-f]", re.IGNORECASE)
_NAMES = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}


def check_json(path: Path, prefix: str) -> None:
    """Raise OptionError, which begins with `prefix`, for the first row that is not an object, with its line."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        first = True
        for number, line in enumerate(file, 1):
            if line.isspace():  # `strip` would copy a long line
                continue
            if first and _ARRAY.match(line):
                _check_array(line + file.read(), number, prefix)
                return
            first = False
            try:
                row = json.loads(line, strict=False)
            except json.JSONDecodeError:
                for start, value, text in _values(line + file.read(), number, prefix):
                    _check_row(value, text, f"{prefix}: line {start}")
                return
            except ValueError as error:  # Python limits the digits of a number
                raise OptionError(f"{prefix}: line {number} has a number that is too large") from error
            except RecursionError as error:
                raise OptionError(_too_deep(f"{prefix}: line {number}")) from error
            _check_row(row, line, f"{prefix}: line {number}")


def find_bad_row(path: Path, prefix: str) -> None:
    """Raise OptionError for the first line with a key that an object has twice, or with a number that is too large."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise _RowError(f"has the key {twice!r:.80} twice: rename one of them")
        return row

    def small(text: str) -> float:
        if abs(float(text)) == float("inf"):
            raise _RowError(f"has a number that is too large: {text:.40}")
        return float(text)

    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            try:
                json.loads(line, object_pairs_hook=unique, parse_float=small)
            except _RowError as error:
                raise OptionError(f"{prefix}: line {number} {error}") from error
            except json.JSONDecodeError as error:
                if error.msg.startswith("Invalid control character"):
                    raise OptionError(f"{prefix}: {_not_json(error, number)}") from error
                return  # the file is no JSON lines


class _RowError(Exception):
    """A row that the reader cannot take."""


def _check_row(row: Any, text: str, where: str, *, texts: bool = False) -> None:
    """Raise OptionError unless a row is an object, or with `texts` a text, that the reader can take."""
    if not isinstance(row, dict) and not (texts and isinstance(row, str)):
        raise OptionError(f"{where} is {_NAMES[type(row)]}, but an object with columns was expected: correct it")
    if text.count("[") + text.count("{") > _DEEPEST and _depth(row) > _DEEPEST:
        raise OptionError(_too_deep(where))
    if _ESCAPED.search(text) and _SURROGATE.search(json.dumps(row, ensure_ascii=False)):
        raise OptionError(f"{where} holds half of a surrogate pair, which is not valid text: correct it")


def _too_deep(where: str) -> str:
    return f"{where} has more than {_DEEPEST} lists and objects inside each other: expected a flat row"


def _depth(value: Any) -> int:
    """How many lists and objects lie inside each other."""
    deepest, open_values = 0, [(value, 1)]
    while open_values:
        inner, depth = open_values.pop()
        if isinstance(inner, (list, dict)):
            deepest = max(deepest, depth)
            open_values += [(one, depth + 1) for one in (inner.values() if isinstance(inner, dict) else inner)]
    return deepest


def _check_array(text: str, first: int, prefix: str) -> None:
    try:
        rows = json.loads(text, strict=False)
    except ValueError as error:
        raise OptionError(f"{prefix}: {_not_json(error, first)}") from error
    except RecursionError as error:
        raise OptionError(_too_deep(f"{prefix}: the array")) from error
    texts = bool(rows) and isinstance(rows[0], str)
    for number, row in enumerate(rows, 1):
        _check_row(row, text if number == 1 else "", f"{prefix}: element {number} of the array", texts=texts)
    if _SURROGATE.search(json.dumps(rows, ensure_ascii=False)):
        raise OptionError(f"{prefix}: the array holds half of a surrogate pair, which is not valid text: correct it")


def _values(text: str, first: int, prefix: str) -> Iterator[tuple[int, Any, str]]:
    """The JSON values that follow each other in a text: the number of the line where one begins, it, and its text."""
    decoder = json.JSONDecoder(strict=False)
    at = len(text) - len(text.lstrip())
    line = first + text.count("\n", 0, at)
    while at < len(text):
        try:
            value, end = decoder.raw_decode(text, at)
        except ValueError as error:
            raise OptionError(f"{prefix}: {_not_json(error, first)}") from error
        except RecursionError as error:
            raise OptionError(_too_deep(f"{prefix}: line {line}")) from error
        yield line, value, text[at:end]
        rest = re.compile(r"\s*").match(text, end)
        after = rest.end() if rest else end
        line += text.count("\n", at, after)
        at = after


def _not_json(error: ValueError, first: int) -> str:
    """What is no JSON in a text that begins at line `first`."""
    if not isinstance(error, json.JSONDecodeError):
        return "a number is too large"  # Python limits their digits
    reason = error.msg.removesuffix(" at")
    return f"line {first + error.lineno - 1} is not JSON ({reason}, column {error.colno}): correct it"
