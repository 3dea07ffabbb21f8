"""How things are shown to a person: sizes, lists of names, tables, an error in one line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


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
    """Rows of cells in columns two spaces apart. With `numbers`, all columns but the first are aligned on the right."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    right = range(1, len(widths)) if numbers else range(0)
    lines = (
        "  ".join(cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(row))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
