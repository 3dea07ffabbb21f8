"""Rows of JSON that a reader cannot take. Oracle: the line that was written wrong, and the texts in the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from loftq.errors import OptionError
from loftq.hub.text import read_text
from loftq.training.data import read_rows

FINE = '{"text": "a"}\n'


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("null\nnull\n", "line 1 is null"),
        (f"{FINE}\nnull\n", "line 3 is null"),
        (f"{FINE}[null]\n", "line 2 is a list"),
        (f'{FINE}"b"\n', "line 2 is a text"),
        (f"{FINE}5\n", "line 2 is a number"),
        (f"{FINE}false\n", "line 2 is true or false"),
        (f"{FINE}{FINE.strip()} null\n", "line 2 is null"),
        ('{\n"text": "a"\n}\nnull\n', "line 4 is null"),
        ('[{"text": "a"}, null]', "element 2 of the array is null"),
        ("[null]", "element 1 of the array is null"),
        ('[{"text": "a"}, "b"]', "element 2 of the array is a text"),
        ('[\n{"text": "a"},\n{"text": b}]', "line 3 is not JSON"),
        (f'{FINE}{{"text": "b\n', r"line 2 is not JSON \(Unterminated string starting, column 10\)"),
        (f'{FINE}{{"text": "b\x01"}}\n', r"line 2 is not JSON \(Invalid control character, column 12\)"),
        (f'{FINE}{{"text": "a", "x": {"[" * 100}{"]" * 100}}}\n', "line 2 has more than 60 lists"),
        (f'{FINE}{{"x": {"[" * 9999}{"]" * 9999}}}\n', "line 2 has more than 60 lists"),
        ("[" * 9999, "the array has more than 60 lists"),
        (f'{FINE}{{"text": "\\ud83d"}}\n', "line 2 holds half of a surrogate pair"),
        ('[{"text": "\\uDC00"}]', "element 1 of the array holds half of a surrogate pair"),
        (f'{FINE}{{"text": "b", "n": {"9" * 5000}}}\n', "line 2 has a number that is too large"),
        (f'{FINE}{{"text": "b", "n": 1e999}}\n', "line 2 has a number that is too large"),
        (f'{FINE}{{"text": "b", "text": "c"}}\n', "line 2 has the key 'text' twice"),
        ("", "has no rows"),
        ("[]", "has no rows"),
        ("{}\n", "has no rows"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_bad_row_is_named_by_its_line(content: str, match: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(OptionError, match=f"--data {path}: (cannot be read: )?{match}") as refused:
        read_rows([str(path)])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (f"\ufeff{FINE}", ["a"]),
        (f"{FINE}\n\n{FINE}", ["a", "a"]),
        ('{"text": "a"} {"text": "b"}\n', ["a", "b"]),
        ('{"text": "a"}\r{"text": "b"}\r', ["a", "b"]),
        ('[{"text": "a"}, {"text": "b"}]', ["a", "b"]),
        ('["a", "b"]', ["a", "b"]),
        ('{"text": "\\ud83d\\ude00"}\n', ["\U0001f600"]),
        ('{"text": "a\\u0000b"}\n', ["a\0b"]),
        (f'{{"text": "a", "n": {"9" * 40}}}\n', ["a"]),
        ('{"text": "[[[[[[{{{{{{"}\n' * 2, ["[[[[[[{{{{{{"] * 2),
    ],
)
def test_what_the_reader_takes_is_not_refused(content: str, texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8", newline="")
    assert read_rows([str(path)])["text"][:] == texts


def test_texts_to_calibrate_on_name_the_line_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{FINE}\nnull\n", encoding="utf-8")
    with pytest.raises(OptionError, match=f"--calibration {path}: line 3 is not an object"):
        list(read_text(str(path)))
