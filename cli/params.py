"""Parameter types that click does not have."""

from __future__ import annotations


def names(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """Names with commas or blanks between, as a tuple; a default is one already."""
    return value if isinstance(value, tuple) else tuple(value.replace(",", " ").split())
