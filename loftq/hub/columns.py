"""Finds the columns of data that a task or a calibration reads, by their roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from loftq.errors import OptionError


class Rows(Protocol):
    """Rows with named columns, as a data set of `datasets` has them."""

    @property
    def column_names(self) -> list[str]:
        """The names of the columns."""


def find_columns(
    rows: Rows, roles: Mapping[str, Sequence[str]], chosen: Mapping[str, str], optional: Sequence[str] = ()
) -> dict[str, str]:
    """Return the column of each role: the chosen column, or else the first of the role's usual names that the data has.

    Raises OptionError for a chosen column that the data does not have, and for a role without a column unless it is
    `optional`.
    """
    columns = {}
    for role, usual in roles.items():
        if role in chosen:
            if chosen[role] not in rows.column_names:
                raise OptionError(
                    f"--column {role}={chosen[role]}: the data has no such column ({_columns(rows)}): name another"
                )
            columns[role] = chosen[role]
            continue
        present = [name for name in usual if name in rows.column_names]
        if present:
            columns[role] = present[0]
        elif role not in optional:
            raise OptionError(
                f"the data has no column for the {role} (looked for: {', '.join(usual)}; {_columns(rows)}): "
                f"name it with --column {role}=NAME"
            )
    return columns


def _columns(rows: Rows) -> str:
    return f"columns: {', '.join(rows.column_names)}"


def text_of(row: Mapping[str, Any], column: str) -> str:
    """Return the text in a column of a row. Raises OptionError if the value is not a text."""
    value = row[column]
    if not isinstance(value, str):
        raise OptionError(f"column {column!r} of the data holds {value!r:.80}, but a text was expected")
    return value
