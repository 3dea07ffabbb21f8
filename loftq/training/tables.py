"""Reads the rows of CSV and TSV files.

Fields are read as the standard library's `csv.DictReader` reads them, and stay text. Where it would guess, the line is
refused: a quote that is not closed, text after a closing quote, a row with too few fields (its fields may have moved to
other columns), and a surplus field that holds something.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from loftq.errors import OptionError

if TYPE_CHECKING:
    from datasets import Dataset

_LINE_END = re.compile(r"\r\n|\r|\n")
_ROWS_AT_ONCE = 200  # number of rows that are in memory before they are written into the cache


def read_tables(paths: Sequence[Path], delimiter: str, option: str) -> Dataset:
    """Read the rows of tables with the same columns. Raises OptionError with the number of the line.

    The rows are kept in the cache of `datasets`, until a file changes.
    """
    from importlib.metadata import version

    import datasets

    prefix = f"{option} {paths[0]}: cannot be read"
    names = next(_table(paths[0], delimiter, prefix), None)
    if names is None:
        raise OptionError(f"{option} {paths[0]}: has no rows: name other data")
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return datasets.Dataset.from_generator(
        _rows,
        features=datasets.Features(dict.fromkeys(names, datasets.Value("string"))),
        writer_batch_size=_ROWS_AT_ONCE,
        gen_kwargs={
            "paths": tuple(map(str, paths)),
            "delimiter": delimiter,
            "option": option,
            "identity": (version("loftq"), *states),  # a changed file is read again
        },
    )


def _rows(paths: tuple[str, ...], delimiter: str, option: str, identity: Any) -> Iterator[dict[str, str]]:  # noqa: ARG001
    expected: list[str] | None = None
    for path in paths:
        prefix = f"{option} {path}: cannot be read"
        table = _table(Path(path), delimiter, prefix)
        names = next(table, None)
        if names is None:  # an empty file
            continue
        expected = expected or names
        if sorted(names) != sorted(expected):
            raise OptionError(
                f"{prefix}: its columns are {', '.join(names)}, but those of {paths[0]} are {', '.join(expected)}: "
                "name files with the same columns"
            )
        for fields in table:
            yield dict(zip(names, fields, strict=True))


def _table(path: Path, delimiter: str, prefix: str) -> Iterator[list[str]]:
    """The names of the columns of a table, then the fields of each row, as many as there are names."""
    names: list[str] | None = None
    for line, fields in _records(path, delimiter, prefix):
        where = f"{prefix}: line {line}"
        if names is None:
            names = _names(fields, where)
            yield names
            continue
        if len(fields) < len(names) or any(field.strip() for field in fields[len(names) :]):
            shown = shorten(", ".join(names), 100, placeholder="…")
            quoting = "comma" if delimiter == "," else "tab"
            count = "1 field" if len(fields) == 1 else f"{len(fields)} fields"
            raise OptionError(
                f"{where} has {count}, but the columns of the table are {shown}: correct it; a "
                f"text with a {quoting} stands in double quotes, and an empty field still has its {quoting}"
            )
        yield fields[: len(names)]


def _names(fields: list[str], where: str) -> list[str]:
    """The names of columns. Fields without a name at the end are no columns; another one may be the number of a row."""
    names = list(fields)
    while names and not names[-1].strip():
        del names[-1]
    if not names:
        raise OptionError(f"{where} names no columns: the first line of a table names its columns")
    for name in names:
        if names.count(name) > 1:
            named = f"{name!r:.80}" if name else "without a name"
            raise OptionError(f"{where} has two columns {named}: rename one of them")
    return names


def _records(path: Path, delimiter: str, prefix: str) -> Iterator[tuple[int, list[str]]]:
    """The fields of each row that is not blank, and the number of the line where it begins."""
    with path.open(encoding="utf-8-sig", newline="") as file, _fields_of_any_length():
        reader = csv.reader(_lines(file, prefix), delimiter=delimiter, strict=True)
        while True:
            first = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise OptionError(_quoting_problem(path, delimiter, first, reader.line_num, error, prefix)) from error
            if fields:
                yield first, fields


def _lines(file: Iterator[str], prefix: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if "\0" in line:
            raise OptionError(f"{prefix}: line {number} holds a zero byte, which is not valid text: remove it")
        yield line


def _quoting_problem(path: Path, delimiter: str, first: int, last: int, error: csv.Error, prefix: str) -> str:
    """What is wrong with the quotes of the row that begins at line `first`."""
    if "end of data" in str(error):
        with path.open(encoding="utf-8-sig", newline="") as file:
            fields = next(csv.reader(islice(file, first - 1, None), delimiter=delimiter))
        opened = first + sum(len(_LINE_END.findall(field)) for field in fields[:-1])
        return (
            f'{prefix}: the quote (") that begins a field in line {opened} is never closed: close it, or write a field '
            "that begins with a quote in quotes, and each quote in it twice"
        )
    begun = "" if first == last else f" (the row begins in line {first})"
    return (
        f"{prefix}: line {last} has text after the quote that closes a field{begun}: write each quote inside of a "
        "quoted field twice"
    )


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """Lift the limit of 131,072 characters that the csv module has for a field."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
