"""Names and files that are no text to calibrate on. The oracle is the message, of an option's error: no traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result

from loftq.errors import OptionError
from loftq.hub.text import read_text

Run = Callable[..., Result]


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("word " * 100, r"--calibration (word )+word…: not a valid name \(File name too long\): expected a file"),
        ("~nobody-of-that-name/x.txt", "--calibration ~nobody-of-that-name/x.txt: not a valid name"),
        ("word word", "--calibration word word: no such file, and not the name of a data set"),
        ("\0.txt", "no such file"),
    ],
)
def test_names_that_are_none_are_refused(source: str, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        list(read_text(source))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b'{"text": "fine"}\n{"text": "bad \\ud83d"}', "row 2 holds half of a surrogate pair"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_rows_that_are_no_text_are_refused(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(content)
    with pytest.raises(OptionError, match=f"--calibration {tmp_path / 't.jsonl'}: {match}"):
        list(read_text(str(tmp_path / "t.jsonl")))


@pytest.mark.parametrize(("name", "content"), [("t.txt", "one"), ("t.jsonl", '{"text": "one"}'), ("t.json", '["one"]')])
def test_a_byte_order_mark_is_no_text(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content.replace('["one"]', '[{"text": "one"}]'), encoding="utf-8-sig")
    assert list(read_text(str(tmp_path / name))) == ["one"]


def test_a_folder_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"--calibration {tmp_path}: is a folder: name a .txt"):
        list(read_text(str(tmp_path)))
