"""The hash of rows. Oracle: the rows, which are the same or not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from rows import sums, write_rows

from loftq.training.data import read_rows
from loftq.training.rows_hash import rows_hash


def hash_of(path: Path) -> str:
    return rows_hash(read_rows([str(path)]))


def test_the_same_rows_have_the_same_hash(tmp_path: Path) -> None:
    """In any format, at any time, under any name, in one part or in several, and with columns in another order."""
    found = hash_of(write_rows(tmp_path / "a.jsonl", sums(70)))
    os.utime(tmp_path / "a.jsonl", (1, 1))
    assert hash_of(tmp_path / "a.jsonl") == found
    table = pyarrow.Table.from_pylist(sums(70))
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=7)
    assert hash_of(tmp_path / "b.parquet") == found
    lines = [f"{row['response']},{row['prompt']}\r\n" for row in sums(70)]
    (tmp_path / "c.csv").write_text("response,prompt\r\n" + "".join(lines), newline="")
    assert hash_of(tmp_path / "c.csv") == found
    rows = Dataset.from_list(sums(80))
    assert rows_hash(rows.select(range(70))) == found
    assert rows_hash(rows.select([*range(5, 75)]).select([0])) == rows_hash(rows.select([5]))


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[:-1],
        lambda rows: [*rows[1:], rows[0]],
        lambda rows: [*rows, rows[-1]],
        lambda rows: [*rows[:-1], {**rows[-1], "response": "It is 7"}],
        lambda rows: [{"prompt": row["response"], "response": row["prompt"]} for row in rows],
        lambda rows: [{"question": row["prompt"], "response": row["response"]} for row in rows],
        lambda rows: [{**row, "weight": 1} for row in rows],
        lambda rows: [*rows[:-1], {**rows[-1], "response": None}],
    ],
)
def test_other_rows_have_another_hash(change: Callable[[list[Any]], list[Any]]) -> None:
    assert rows_hash(Dataset.from_list(change(sums(70)))) != rows_hash(Dataset.from_list(sums(70)))


def test_a_cell_does_not_run_into_the_next() -> None:
    pairs = [{"a": "x", "b": "yz"}, {"a": "xy", "b": "z"}, {"a": "1", "b": ""}, {"a": 1, "b": ""}, {"a": None, "b": ""}]
    nested = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    hashes = {rows_hash(Dataset.from_list([row])) for row in pairs}
    hashes |= {rows_hash(Dataset.from_list([{"a": row, "b": ""}])) for row in nested}
    assert len(hashes) == 7
