"""Breaks the lines of a text between words while it is written to a terminal."""

from __future__ import annotations

import re
import shutil
from typing import TextIO, cast

_MOST = 100  # columns: longer lines are hard to read


class Wrapped:
    """A stream whose lines end before the width of the terminal. Blocks of code between ``` keep their lines."""

    def __init__(self, stream: TextIO, width: int) -> None:
        self._stream, self._width = stream, width
        self._column = 0
        self._line = ""
        self._code = False

    @classmethod
    def over(cls, stream: TextIO) -> TextIO:
        """A stream that wraps at the width of the terminal."""
        return cast(TextIO, cls(stream, min(shutil.get_terminal_size().columns, _MOST)))

    def write(self, text: str) -> int:
        """Write a text of whole words."""
        for piece in re.findall(r"\n|[^\S\n]+|\S+", text):
            self._write_piece(piece)
        return len(text)

    def _write_piece(self, piece: str) -> None:
        if piece == "\n":
            self._code ^= self._line.lstrip().startswith("```")
            self._column, self._line = 0, ""
        else:
            full = self._column + len(piece) > self._width - 1
            if full and self._column and not self._code:
                self._stream.write("\n")
                self._column = 0
                if piece.isspace():
                    return
            self._column += len(piece)
            self._line += piece
        self._stream.write(piece)

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()
