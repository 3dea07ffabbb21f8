"""What a person is shown. Oracle: the lines, written out by hand."""

from __future__ import annotations

import pytest

from loftq.display import columns, few_of, key_values, one_line, size


def test_values_begin_in_one_column() -> None:
    rows = [("folder", "out"), ("bits per weight", "4.127"), ("note", "a note that is long")]
    shown = "folder           out\nbits per weight  4.127\nnote             a note that is long"
    assert key_values(iter(rows)) == shown


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [("type", "bits", "note"), ("nf4", "4.127", ""), ("int", "4", "stock")]
    assert columns(rows) == "type  bits   note\nnf4   4.127\nint   4      stock"
    assert columns(rows[:2], numbers=True) == "type   bits  note\nnf4   4.127"
    assert columns([]) == ""


def test_an_error_is_one_line() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(ValueError("two\n  lines"), 5) == "two l"
    assert one_line(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("nbytes", "shown"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (15e8, "1.5 GB"), (2e12, "2.0 TB")]
)
def test_sizes_are_decimal(nbytes: float, shown: str) -> None:
    assert size(nbytes) == shown


def test_a_few_names_stand_for_many() -> None:
    assert few_of(["a", "b", "c"]) == "a, b, c"
    assert few_of(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
