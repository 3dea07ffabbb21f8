"""How things are shown to a person: sizes, lists of names, tables, an error in one line."""

from __future__ import annotations

from collections.abc import Sequence


def one_line(error: BaseException) -> str:
    """What an error says, whatever it is, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def few_of(names: Sequence[str]) -> str:
    """A few of many names, for a note."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def size(nbytes: float) -> str:
    """Bytes for a person, in decimal units as the Hub shows them."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
