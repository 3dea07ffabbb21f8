"""Tables. Oracle: csv.DictReader on the same file, and the line that was written wrong."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path
from typing import Any

import pytest

from loftq.errors import OptionError
from loftq.training.data import read_rows
from loftq.training.tables import _rows

ENDS = ["\n", "\r\n", "\r"]
DELIMITERS = {"csv": ",", "tsv": "\t"}
CELLS = ["", "007", "NA", "null", "1.50", " x ", "=", "é\u2028x"]
CELLS += ['say "hi"', "a,b", "a\tb", "two\nlines", "b\r\nc", "d\re", '"']


def read(path: Path) -> list[dict[str, Any]]:
    """The rows, without the cache of `datasets`."""
    return list(_rows((str(path),), DELIMITERS[path.suffix[1:]], "--data", None))


def oracle(path: Path) -> list[dict[Any, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, delimiter=DELIMITERS[path.suffix[1:]]))


def line_of(fields: list[str], delimiter: str, quoting: Any) -> str:
    line = io.StringIO()
    csv.writer(line, delimiter=delimiter, lineterminator="\r\n", quoting=quoting).writerow(fields)
    return line.getvalue().removesuffix("\r\n")


def written(content: str, path: Path) -> Path:
    path.write_bytes(content.encode())
    return path


@pytest.mark.parametrize("suffix", DELIMITERS)
@pytest.mark.parametrize("seed", range(40))
def test_rows_are_those_of_the_standard_library(seed: int, suffix: str, tmp_path: Path) -> None:
    """With marks, ends of lines, blank lines, surplus empty fields, and cells that need quotes."""
    dice = random.Random(seed)
    end, delimiter = dice.choice(ENDS), DELIMITERS[suffix]
    names = dice.sample(["prompt", "response", "id", "", "a b", "é", 'q"'], dice.randrange(1, 5))
    names = names if names[-1] else [*names, "last"]
    path = tmp_path / f"a.{suffix}"
    quoting = dice.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    with path.open("w", encoding=dice.choice(["utf-8", "utf-8-sig"]), newline="") as file:
        file.write(line_of(names, delimiter, quoting))
        for _ in range(dice.randrange(12)):
            file.write(end + dice.choice(["", end]) + line_of([dice.choice(CELLS) for _ in names], delimiter, quoting))
            file.write(dice.choice(["", "", delimiter, delimiter * 2]))
        file.write(dice.choice(["", end, end * 3]))
    expected = oracle(path)
    for row in expected:
        assert not any(row.pop(None, []))
    assert read(path) == expected


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (["a,b", "1,2,3"], "line 2 has 3 fields, but the columns of the table are a, b: "),
        (["a,b", "1,2,", "", "1,2,,x"], "line 4 has 4 fields, "),
        (["a,b", "1,2", "1"], "line 3 has 1 field, "),
        (["a,b", '1,"x', "", 'y"', "3"], "line 5 has 1 field, "),
        (["a,b", '1,"x', "y", "3,4"], r'quote \("\) that begins a field in line 2 is never closed'),
        (["a,b", '"1', '2","x', "y", "3,4"], r'quote \("\) that begins a field in line 3 is never closed'),
        (["a,b", '1,"x', "y,2", '"z",3'], r"line 4 has text after the quote .* \(the row begins in line 2\)"),
        (["a,b", '1,"x" y'], "line 2 has text after the quote that closes a field: write"),
        (["a,b", "1,2", "1,x\0y"], "line 3 holds a zero byte"),
        (["", "a,b,a", "1,2,3"], "line 2 has two columns 'a'"),
        ([",a,,b", "1,2,3,4"], "line 1 has two columns without a name"),
        ([",,", "1,2,3"], "line 1 names no columns"),
        (["a,b,", "1,2,x"], "line 2 has 3 fields"),
    ],
)
def test_a_bad_line_is_named(lines: list[str], match: str, end: str, tmp_path: Path) -> None:
    path = written(end.join(lines) + end, tmp_path / "a.csv")
    with pytest.raises(OptionError, match=f"--data {path}: cannot be read: .*{match}") as refused:
        read_rows([str(path)])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("\n\na,b\n1,2\n", [{"a": "1", "b": "2"}]),
        (",a\n0,x\n", [{"": "0", "a": "x"}]),  # as pandas writes the number of a row
        ("a,b,,\n1,2,,\n1,2\n", [{"a": "1", "b": "2"}] * 2),
        ('a\n\n x\n""\n', [{"a": " x"}, {"a": ""}]),
        ("prompt,response\nWhat is 1+1?,2,\n", [{"prompt": "What is 1+1?", "response": "2"}]),
    ],
)
def test_what_is_clear_is_read(content: str, rows: list[dict[str, str]], tmp_path: Path) -> None:
    path = written(content, tmp_path / "a.csv")
    assert read_rows([str(path)]).to_list() == rows


def test_a_long_field_is_read(tmp_path: Path) -> None:
    text = "word " * 2_000_000
    assert read(written(f'a,b\n1,"{text}"\n', tmp_path / "a.csv")) == [{"a": "1", "b": text}]
    assert csv.field_size_limit() == 131_072


def test_several_tables_have_the_same_columns(tmp_path: Path) -> None:
    first, second = written("a,b\n1,2\n", tmp_path / "1.csv"), written("b,a\n4,3\n", tmp_path / "2.csv")
    assert read_rows([str(first), str(second)]).to_list() == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    other = written("a,c\n1,2\n", tmp_path / "3.csv")
    with pytest.raises(OptionError, match=r"3\.csv: cannot be read: its columns are a, c, but .*1\.csv are a, b"):
        read_rows([str(first), str(other)])


def test_a_table_that_changed_is_read_again(tmp_path: Path) -> None:
    for cell in ("1", "2"):
        assert read_rows([str(written(f"a\n{cell}\n", tmp_path / "a.csv"))])["a"][:] == [cell]


@pytest.mark.parametrize("content", ["", "\n\n", "a,b\n", "\ufeff"])
def test_a_table_without_rows(content: str, tmp_path: Path) -> None:
    path = written(content, tmp_path / "a.csv")
    with pytest.raises(OptionError, match=r"a\.csv: has no rows: name other data"):
        read_rows([str(path)])
