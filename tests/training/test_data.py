"""Rows and columns. Oracle: the rows that were written."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from conftest import byte_tokenizer
from hub import Hub, datasets_of, serve
from rows import sums, write_rows

from loftq.errors import OptionError
from loftq.hub.columns import find_columns
from loftq.training.data import hold_out, read_rows
from loftq.training.encoding import Encoder
from loftq.training.tasks import language_modelling
from loftq.training.tasks.classification import encode

ROLES = {"prompt": ("prompt",), "response": ("response", "output"), "input": ("input",)}


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(sums(5))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.csv.write_csv(table, tmp_path / "a.csv")
    pyarrow.csv.write_csv(table, tmp_path / "a.tsv", pyarrow.csv.WriteOptions(delimiter="\t"))
    write_rows(tmp_path / "a.jsonl", sums(5))
    for name in ("a.parquet", "a.csv", "a.tsv", "a.jsonl"):
        assert read_rows([str(tmp_path / name)]).to_list() == sums(5), name
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert read_rows([str(tmp_path / "a.txt")]).to_list() == [{"text": "one\n\ntwo\n"}]


def test_files_are_read_without_a_word_to_the_network(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(sums(5))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.csv.write_csv(table, tmp_path / "a.csv")
    write_rows(tmp_path / "a.jsonl", sums(5))
    (tmp_path / "a.txt").write_text("one\n", encoding="utf-8")
    with serve(Hub()) as hub, datasets_of(hub.endpoint, tmp_path / "hf"):
        for name in ("a.parquet", "a.csv", "a.jsonl", "a.txt"):
            read_rows([str(tmp_path / name)])
    assert hub.requests == []


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    for count in (2, 3):
        path = write_rows(tmp_path / "a.jsonl", sums(count))
        assert read_rows([str(path)]).to_list() == sums(count)


def test_without_its_library_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(OptionError, match=r"--data user/set: .* pip install 'loftq\[train\]'"):
        read_rows(["user/set"])


def test_files_of_one_kind_follow_each_other(tmp_path: Path) -> None:
    first, second = write_rows(tmp_path / "a.jsonl", sums(2)), write_rows(tmp_path / "b.jsonl", sums(3))
    assert read_rows([str(first), str(second)]).to_list() == sums(2) + sums(3)
    (tmp_path / "c.txt").write_text("x", encoding="utf-8")
    with pytest.raises(OptionError, match="expected files of the same kind"):
        read_rows([str(first), str(tmp_path / "c.txt")])

    (tmp_path / "a.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    (tmp_path / "b.tsv").write_text("a\tb\n1\t2\n", encoding="utf-8")
    with pytest.raises(OptionError, match="expected files of the same kind"):
        read_rows([str(tmp_path / "a.csv"), str(tmp_path / "b.tsv")])


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_cell_of_a_table_is_the_text_that_it_is(delimiter: str, tmp_path: Path) -> None:
    cells = [("2+2?", "4"), ("which gas?", "NA"), ("none", ""), ("agent", "007"), ("price", "1.50")]
    path = tmp_path / ("a.csv" if delimiter == "," else "a.tsv")
    lines = [delimiter.join(row) for row in [("prompt", "answer"), *cells]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")  # as Excel begins a file
    assert read_rows([str(path)]).to_list() == [{"prompt": asked, "answer": said} for asked, said in cells]


def test_labels_of_a_table_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\ngood,1\nbad,0\n", encoding="utf-8")
    encoder = Encoder(byte_tokenizer(), "sequence-classification", 64)
    assert encode(read_rows([str(tmp_path / "a.csv")]), {}, encoder)["labels"][:] == [1, 0]
    for label in ("fine", "nan", ""):
        (tmp_path / "b.csv").write_text(f"text,label\ngood,{label}\n", encoding="utf-8")
        with pytest.raises(OptionError, match=f"holds '{label}', but a whole number from 0 to 1 was expected"):
            encode(read_rows([str(tmp_path / "b.csv")]), {}, encoder)


def test_bytes_that_are_no_text_are_found_by_their_line(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "x"}\n{"a": "caf\xe9"}\n')
    with pytest.raises(OptionError, match=r"--eval-data .*latin\.jsonl: line 2 is not UTF-8"):
        read_rows([str(tmp_path / "latin.jsonl")], "--eval-data")
    with pytest.raises(OptionError, match="is a folder: name each file in it with --data"):
        read_rows([str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("none.jsonl", None, "no such file"),
        ("empty.jsonl", "", "has no rows|cannot be read"),
        ("bad.jsonl", '{"a": 1}\n{"a"\n', "cannot be read"),
        ("rows.xlsx", "x", r"expected a \.txt, \.jsonl"),
        ("empty.csv", "", "cannot be read|has no rows"),
    ],
)
def test_data_that_cannot_be_read(name: str, content: str | None, problem: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(OptionError, match=problem) as caught:
        read_rows([str(tmp_path / name)])
    assert name in str(caught.value)


def test_columns_are_found_by_usual_names_or_by_name(tmp_path: Path) -> None:
    rows = read_rows([str(write_rows(tmp_path / "a.jsonl", [{"prompt": "p", "output": "o", "mine": "m"}]))])
    assert find_columns(rows, ROLES, {}, ("input",)) == {"prompt": "prompt", "response": "output"}
    assert find_columns(rows, ROLES, {"prompt": "mine"}, ("input",))["prompt"] == "mine"
    with pytest.raises(
        OptionError, match=r"no column for the input .*columns: prompt, output, mine.*--column input=NAME"
    ):
        find_columns(rows, ROLES, {})
    with pytest.raises(OptionError, match="--column prompt=theirs: the data has no such column"):
        find_columns(rows, ROLES, {"prompt": "theirs"})


def test_a_column_that_is_named_goes_before_conversations(tmp_path: Path) -> None:
    spoken = [{"role": "user", "content": "other"}, {"role": "assistant", "content": "no"}]
    rows = [{"messages": spoken, "p": "1+1=", "response": "2"}]
    read = read_rows([str(write_rows(tmp_path / "a.jsonl", rows))])
    encoder = Encoder(byte_tokenizer(), "causal-lm", 64, chat_template=False)
    found = language_modelling.encode(read, {"prompt": "p"}, encoder)["input_ids"][0]
    assert found == encoder.pair("1+1=\n", "2")["input_ids"]


def test_a_twentieth_is_held_out(tmp_path: Path) -> None:
    rows = read_rows([str(write_rows(tmp_path / "a.jsonl", [{"n": i} for i in range(60)]))])
    learned, held = hold_out(rows, 0, shuffle=True)
    assert held is not None
    assert len(held) == 3
    assert sorted(learned["n"][:] + held["n"][:]) == list(range(60))
    assert hold_out(rows, 0, shuffle=False)[1]["n"][:] == [57, 58, 59]  # type: ignore[index]
    assert hold_out(rows, 0, shuffle=True)[1]["n"][:] == held["n"][:]  # type: ignore[index]
    assert hold_out(rows.select([0]), 0, shuffle=True)[1] is None
