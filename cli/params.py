"""Parameter types that click does not have."""

from __future__ import annotations

from typing import Any

import click


class Names(click.ParamType[tuple[str, ...]]):
    """Names with commas or blanks between, as a tuple."""

    name = "names"

    def convert(self, value: Any, _param: click.Parameter | None, _context: click.Context | None) -> tuple[str, ...]:
        """Split; a tuple is left as it is."""
        if isinstance(value, tuple):
            return value
        return tuple(part for part in str(value).replace(",", " ").split() if part)
