"""How things are shown to a person: sizes, lists of names, tables, an error in one line.

Names, notes and messages may come from files that somebody else wrote. `visible` makes them safe for a terminal, and
`markdown` makes them safe for a card.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar

line_width: ContextVar[int | None] = ContextVar("line_width", default=None)  # of tables; None: no limit
_LEAST = 8  # characters: no cell is made narrower
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats (direction, zero width), half surrogates, separators
_MARKS = re.compile(r"[\\`*\[\]<>|~$&]|(?<!\w)_|_(?!\w)|^[#+=-](?=\s|$)|://")


def visible(text: str, *, lines: bool = False) -> str:
    """A text in which escapes such as `\\x1b` replace the characters that a terminal would obey and not show.

    These are control characters, and those that change the direction of text or have no width. With `lines`, line
    breaks and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(char) if _is_unseen(char) and not (lines and char in "\n\t") else char for char in text)


def _is_unseen(char: str) -> bool:
    return unicodedata.category(char) in _UNSEEN


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()


def markdown(text: str) -> str:
    """A text for a card, which Markdown and HTML show as it is: no table cell, link, image or tag begins in it."""
    return _MARKS.sub(_harmless, " ".join(visible(text).split()))


def _harmless(match: re.Match[str]) -> str:
    mark = match[0]
    if mark in "<>&":
        return {"<": "&lt;", ">": "&gt;", "&": "&amp;"}[mark]
    return ":&#47;/" if mark == "://" else f"\\{mark}"  # a whole address would become a link


def markdown_table(rows: Mapping[str, str]) -> str:
    """Names and their values as a table in Markdown."""
    return "\n".join(
        ["| | |", "| --- | --- |", *(f"| {markdown(name)} | {markdown(value)} |" for name, value in rows.items())]
    )


def code(text: str) -> str:
    """A text as code within a line of Markdown."""
    shown = visible(text)
    marks = "`" * (1 + _longest_row(shown))
    return f"{marks} {shown} {marks}" if shown.startswith("`") or shown.endswith("`") else f"{marks}{shown}{marks}"


def code_block(text: str) -> str:
    """A text as a block of code in Markdown, whose fence is longer than any row of backticks in it."""
    shown = visible(text, lines=True)
    fence = "`" * max(3, 1 + _longest_row(shown))
    return f"{fence}\n{shown}\n{fence}"


def _longest_row(text: str) -> int:
    """The number of backticks that follow each other in a text."""
    return max(map(len, re.findall("`+", text)), default=0)


def one_line(error: BaseException, most: int | None = None) -> str:
    """The message of any error in one line, at most `most` characters of it; the error's class where it has none."""
    return (" ".join(str(error).split()) or type(error).__name__)[:most]


def few_of(names: Sequence[str]) -> str:
    """The first few of many names, for a note."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def size(nbytes: float) -> str:
    """Bytes for a person, in decimal units as the Hub shows them."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def key_values(rows: Iterable[tuple[str, str]]) -> str:
    """Names and their values, one pair a line; the values begin in the same column."""
    return columns(list(rows))


def columns(rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """Rows of cells in columns two spaces apart. With `numbers`, all columns but the first are aligned on the right.

    Cells are wrapped between words, or within long ones, where a row would be longer than `line_width`.
    """
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    most = line_width.get()
    if most is not None:
        widths = _narrowed(rows, widths, most - 2 * (len(widths) - 1))
        rows = [line for row in rows for line in _wrapped(row, widths)]
    right = range(1, len(widths)) if numbers else range(0)
    lines = (
        "  ".join(cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(row))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _narrowed(rows: Sequence[Sequence[str]], widths: Sequence[int], room: int) -> list[int]:
    """The widths of columns that share `room`: the widest become equally narrow, but whole words fit if they can."""
    words = [
        max((len(word) for cell in cells for word in cell.split()), default=0) for cells in zip(*rows, strict=True)
    ]
    least = words if sum(words) <= room else [min(width, _LEAST) for width in widths]
    limit = max(widths, default=0)
    while sum(map(max, least, (min(width, limit) for width in widths))) > room and limit > 1:
        limit -= 1
    return [max(word, min(width, limit)) for word, width in zip(least, widths, strict=True)]


def _wrapped(row: Sequence[str], widths: Sequence[int]) -> list[list[str]]:
    """The lines of a row whose cells are wrapped to the widths of their columns."""
    from textwrap import wrap  # imported here, because most tables need none of it

    cells = [
        [cell] if len(cell) <= width else wrap(cell, width, break_on_hyphens=False)
        for cell, width in zip(row, widths, strict=True)
    ]
    return [[cell[i] if i < len(cell) else "" for cell in cells] for i in range(max(map(len, cells)))]
