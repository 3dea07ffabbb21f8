"""Encodings other than UTF-8. Oracle: Python's codecs, which write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from loftq.errors import OptionError
from loftq.hub.encodings import check_utf8
from loftq.hub.text import read_text
from loftq.training.data import read_rows

TEXT = "text,label\nThe quick brown fox,1\nand a café,0\n"
LINES = '{"text": "one"}\n{"text": "a café"}\n'


@pytest.mark.parametrize(
    ("encoding", "named"),
    [
        ("utf-16", r"is UTF-16, not UTF-8: save it as UTF-8 \(`iconv -f UTF-16 -t UTF-8`\)"),
        ("utf-16-le", "is UTF-16LE, not UTF-8"),
        ("utf-16-be", "is UTF-16BE, not UTF-8"),
        ("utf-32", "is UTF-32, not UTF-8"),
        ("utf-32-le", "is UTF-32LE, not UTF-8"),
        ("utf-32-be", "is UTF-32BE, not UTF-8"),
        ("windows-1252", "line [23] is not UTF-8 .*: save it as UTF-8"),
        ("shift_jis", "line [23] is not UTF-8 .*: save it as UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.jsonl", "a.json"])
def test_an_encoding_is_named(encoding: str, named: str, name: str, tmp_path: Path) -> None:
    content = LINES if "json" in name else TEXT
    (tmp_path / name).write_bytes(content.replace("é", "ア" if encoding == "shift_jis" else "é").encode(encoding))
    with pytest.raises(OptionError, match=f"--data {tmp_path / name}: {named}") as refused:
        read_rows([str(tmp_path / name)])
    assert "\n" not in str(refused.value)
    if name not in ("a.csv", "a.tsv"):
        problem = f"--calibration {tmp_path / name}: cannot be read as UTF-8 text: {named}"
        with pytest.raises(OptionError, match=problem):
            list(read_text(str(tmp_path / name)))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_line_counts_every_end_of_a_line(end: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(end.join(["é" * 700_000, "", "fine"]).encode() + end.encode() + b"\xe9")
    with pytest.raises(OptionError, match="line 4 is not UTF-8"):
        check_utf8(path, "")
    path.write_bytes("é".encode()[:1])
    with pytest.raises(OptionError, match=r"line 1 is not UTF-8 \(unexpected end of data\)"):
        check_utf8(path, "")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_training_and_calibration_read_the_same_text(mark: str, end: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(f"{mark}one{end}zero\0 {end}".encode())
    expected = "one\nzero\0 \n"
    assert read_rows([str(tmp_path / "a.txt")])["text"][:] == [expected] == list(read_text(str(tmp_path / "a.txt")))
