"""Files of text must be UTF-8: any other encoding is named, or else the first line that is not UTF-8."""

from __future__ import annotations

import codecs
from pathlib import Path

from loftq.errors import OptionError

_MARKS = {  # those of UTF-32 begin like those of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_CHUNK = 2**20  # bytes


def check_utf8(path: Path, prefix: str) -> None:
    """Raise OptionError, which begins with `prefix`, unless a file is UTF-8, which may begin with a byte-order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        chunk = file.read(_CHUNK)
        name = _encoding(chunk[:4096])
        if name is not None:
            raise OptionError(f"{prefix} is {name}, not UTF-8: save it as UTF-8 (`iconv -f {name} -t UTF-8`)")
        try:
            while chunk:
                decoder.decode(chunk)
                chunk = file.read(_CHUNK)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise OptionError(
                f"{prefix} line {_first_bad_line(path)} is not UTF-8 ({error.reason}): save it as UTF-8 (from "
                "Windows-1252: `iconv -f WINDOWS-1252 -t UTF-8`)"
            ) from error


def _encoding(start: bytes) -> str | None:
    """Whether a file that begins so is UTF-16 or UTF-32: by its mark, or by its zeros if most letters are Latin."""
    for mark, name in _MARKS.items():
        if start.startswith(mark):
            return name
    zeros = "".join("0" if start[at::4].count(0) * 8 > len(start) else "x" for at in range(4))  # most bytes there
    return {
        "x000": "UTF-32LE",
        "000x": "UTF-32BE",
        "x0x0": "UTF-16LE",
        "0x0x": "UTF-16BE",
    }.get(zeros)


def _first_bad_line(path: Path) -> int:
    with path.open(encoding="latin-1", newline="") as file:  # a line ends with LF, CR or both
        for number, line in enumerate(file, 1):
            try:
                line.encode("latin-1").decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1
