"""The one reader and the one writer of JSON, and the small language in which the expected content is declared.

Every JSON file that another process, another program or another machine has written is read by `read_json`, and other
JSON text by `parse_json`. Both check the whole document (valid UTF-8, no repeated keys, no NaN or infinity, limited
depth and size) and then compare it with a schema. Each problem is one line that names the file, the key, what was
expected and the next step. Keys that the schema does not name are allowed, because a later version may write them.

A schema is one of these:

    str, bool, int, float, dict, list      a type; an int has at most 63 bits, a float may be written as 3
    None, object                           null, anything
    {"name": schema, "name?": schema}      an object; a key with a question mark may be missing
    {str: schema}                          an object with any keys
    [schema]                               a list
    (schema, schema)                       one of several
    whole(least, most), number(...), one_of(names), file_name       values within limits
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from loftq.display import one_line
from loftq.errors import ArtifactError, LoftQError, OutputError
from loftq.formats.disk import is_inside

AGAIN = "copy or download it again"
_DEEPEST = 64  # levels of nesting; the parser itself gives up at about a thousand
_LARGEST = 512 * 2**20  # bytes of a file
_INTEGER = 2**63
_NAMES = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "an object",
    list: "a list",
    None: "null",
    object: "any value",
}


@dataclass(frozen=True)
class Limited:
    """A schema of values that `fits` accepts; `expected` says in words which values these are."""

    expected: str
    fits: Callable[[Any], bool]


class _ProblemError(ValueError):
    """A problem with a document, in words that name the key."""


def whole(least: int = 0, most: int = 2**53) -> Limited:
    """A whole number within bounds."""
    upper = f", at most {most}" if most < 2**53 else ""
    return Limited(f"a whole number of at least {least}{upper}", lambda v: type(v) is int and least <= v <= most)


def number(least: float = -math.inf, above: float = -math.inf, most: float = 1e300) -> Limited:
    """A number within bounds; `above` is not among them."""
    lower = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
    return Limited(f"a number{lower}", lambda v: _is_number(v) and least <= v <= most and v > above)


def one_of(names: Collection[str]) -> Limited:
    """One of several texts."""
    return Limited(f"one of {', '.join(sorted(names))}", lambda v: isinstance(v, str) and v in names)


file_name = Limited("a file name inside its folder", lambda v: isinstance(v, str) and len(v) < 4096 and is_inside(v))


def read_json(
    path: Path,
    schema: Any,
    *,
    error: type[LoftQError] = ArtifactError,
    advice: str = AGAIN,
    fault: str = "is damaged",
    foreign: bool = False,
) -> Any:
    """The content of a JSON file that fits a schema. Raises `error` with one line: "PATH FAULT (why): ADVICE".

    `foreign` is for files that loftq does not define: infinities are allowed there, which Python's own writer leaves,
    and the last of several equal keys counts, as for other readers. A missing file raises FileNotFoundError, for which
    callers have their own advice.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise error(f"{path} {fault} (it has {path.stat().st_size} bytes, expected JSON): {advice}")
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror}): {advice}") from problem
    return parse_json(content, path, schema, error=error, advice=advice, fault=fault, foreign=foreign)


def parse_json(
    content: bytes | str,
    where: object,
    schema: Any,
    *,
    error: type[LoftQError] = ArtifactError,
    advice: str = AGAIN,
    fault: str = "is damaged",
    foreign: bool = False,
) -> Any:
    """The value of JSON text that fits a schema. `where` names the text in the error, as the path does for a file."""
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = json.loads(text, object_pairs_hook=None if foreign else _without_repeats)
        _check_document(value, foreign)
        _check(value, schema, "")
        return value
    except _ProblemError as problem:
        raise error(f"{where} {fault} ({problem}): {advice}") from problem
    except RecursionError as problem:
        raise error(f"{where} {fault} (it is nested too deeply): {advice}") from problem
    except UnicodeDecodeError as problem:
        raise error(f"{where} {fault} (it is not valid UTF-8): {advice}") from problem
    except ValueError as problem:
        raise error(f"{where} {fault} (it is not valid JSON: {one_line(problem, 120)}): {advice}") from problem


def check_value(
    value: Any,
    schema: Any,
    where: object,
    *,
    error: type[LoftQError] = ArtifactError,
    advice: str = AGAIN,
    fault: str = "is damaged",
) -> None:
    """Raise `error` if a value does not fit a schema: one that `read_json` read, or the answer of a server."""
    try:
        _check(value, schema, "")
    except _ProblemError as problem:
        raise error(f"{where} {fault} ({problem}): {advice}") from problem


def json_text(value: Any, **options: Any) -> str:
    """A value as strict JSON. Raises OutputError for NaN and infinities, which JSON cannot hold."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError as problem:
        key = next((_path(at) for at, part in _walk(value) if _is_infinite(part)), "")
        raise OutputError(f"cannot write {key or 'a value'} as JSON: {one_line(problem)}") from problem


def finite(value: Any) -> Any:
    """A value in which null replaces each number that is not finite, for a result that has such a number."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if _is_infinite(value) else value


def shown(value: Any) -> str:
    """A value for a message: short, and without characters that a terminal would interpret."""
    if isinstance(value, (dict, list)):
        return f"{_NAMES[type(value)]} of {len(value)}"
    text = json.dumps(value) if isinstance(value, (str, bool, int, float)) or value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _ProblemError(f"the key {shown(next(key for key in keys if keys.count(key) > 1))} occurs twice")
    return entries


def _walk(value: Any) -> Iterator[tuple[Any, Any]]:
    """All parts of a document, each with its place: a chain (place of the container, key or index)."""
    waiting: list[tuple[Any, Any]] = [((), value)]
    while waiting:
        place, part = waiting.pop()
        yield place, part
        if isinstance(part, dict):
            waiting.extend(((place, key), inner) for key, inner in part.items())
        elif isinstance(part, (list, tuple)):
            waiting.extend(((place, index), inner) for index, inner in enumerate(part))


def _check_document(value: Any, foreign: bool) -> None:
    """Raise _ProblemError for what no document may hold, whatever its schema."""
    for place, part in _walk(value):
        if isinstance(part, float):
            if math.isnan(part) or (math.isinf(part) and not foreign):
                _refuse(_path(place), "a finite number", part)
        elif isinstance(part, str):
            _check_text(part, place)
        elif isinstance(part, dict):
            for key in part:
                _check_text(key, place)
        if isinstance(part, (dict, list)) and _depth(place) >= _DEEPEST:
            raise _ProblemError("it is nested too deeply")


def _check_text(text: str, place: Any) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            _refuse(_path(place), "valid Unicode", text)


def _depth(place: Any) -> int:
    depth = 0
    while place:
        place, depth = place[0], depth + 1
    return depth


def _path(place: Any) -> str:
    """The place of a value as a person writes it: `layers[3].shape`, `files["a.json"].bytes`."""
    keys: list[Any] = []
    while place:
        place, key = place
        keys.insert(0, key)
    path = ""
    for key in keys:
        path = _joined(path, key)
    return path


def _joined(path: str, key: str | int) -> str:
    if isinstance(key, int) or not key.replace("-", "_").isidentifier() or not key.isascii():
        return f"{path}[{shown(key)}]"
    return f"{path}.{key}" if path else key


def _check(value: Any, schema: Any, path: str) -> None:
    """Raise _ProblemError at the first part of a value that does not fit."""
    if isinstance(schema, tuple):
        schema = next((one for one in schema if _fits(value, one)), schema)
    if not _fits(value, schema):
        _refuse(path, _expected(schema), value)
    if isinstance(schema, list):
        for index, part in enumerate(value):
            _check(part, schema[0], f"{path}[{index}]")
    elif isinstance(schema, dict) and str in schema:
        for key, part in value.items():
            if not _fits(key, str):
                _refuse(path, "names without a null character", key)
            _check(part, schema[str], _joined(path, key))
    elif isinstance(schema, dict):
        for name, part in schema.items():
            key = name.removesuffix("?")
            if key in value:
                _check(value[key], part, _joined(path, key))
            elif key == name:
                raise _ProblemError(f"{_joined(path, key)} is missing, expected {_expected(part)}")


def _fits(value: Any, schema: Any) -> bool:
    """Whether the outermost part of a value fits."""
    if isinstance(schema, tuple):
        return any(_fits(value, one) for one in schema)
    if isinstance(schema, (dict, list)):
        return isinstance(value, type(schema))
    if isinstance(schema, Limited):
        return schema.fits(value)
    if schema is None or schema is object:
        return schema is object or value is None
    if schema is str:
        return isinstance(value, str) and "\0" not in value
    if schema is int:
        return type(value) is int and -_INTEGER <= value < _INTEGER
    return _is_number(value) if schema is float else isinstance(value, schema)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e300 <= value <= 1e300


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _expected(schema: Any) -> str:
    if isinstance(schema, tuple):
        return " or ".join(dict.fromkeys(map(_expected, schema)))
    if isinstance(schema, Limited):
        return schema.expected
    return _NAMES[type(schema) if isinstance(schema, (dict, list)) else schema]


def _refuse(path: str, expected: str, value: Any) -> NoReturn:
    raise _ProblemError(f"{path or 'it'} is {shown(value)}, expected {expected}")
