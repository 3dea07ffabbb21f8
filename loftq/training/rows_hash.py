"""A hash of the rows of a data set, which tells whether a training continues with the rows that it began with."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_AT_ONCE = 64


def rows_hash(rows: Dataset) -> str:
    """SHA-256 of the values of all rows in their order, with the names of their columns.

    It does not depend on files: neither on their names, nor their times, nor their format. Images and sounds are not
    decoded.
    """
    names = sorted(rows.column_names)
    digest = hashlib.sha256(json.dumps(names).encode())
    for batch in rows.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        for values in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
            digest.update(b"\n")
            for value in values:  # a text by its bytes, because copies of a long one cost memory
                content = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
                digest.update(f"{type(value).__name__} {len(content)} ".encode())
                digest.update(content.encode())
    return digest.hexdigest()
