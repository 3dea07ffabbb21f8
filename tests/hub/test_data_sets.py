"""Data sets on the Hub, streamed to calibrate on and loaded to train on: the real datasets library before a Hub on
this machine. The oracle is the rows that were written; for what was asked for, the Hub's record.

Covers: loftq/hub/errors.py.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hub import Hub, datasets_of, serve

from loftq.errors import OptionError
from loftq.hub.text import read_text
from loftq.training.data import read_rows

TOKEN = "hf_TheTokenThatOpensIt"
STRANGER = "hf_TheTokenOfSomebodyElse"
CARD = """---
configs:
- config_name: plain
  data_files: [{split: held, path: plain/*.parquet}]
- config_name: marked
  data_files: [{split: held, path: marked/*.parquet}, {split: train, path: marked/more/*.parquet}]
---
"""


def rows(word: str, count: int = 5) -> list[dict[str, Any]]:
    return [{"number": i, "text": f"{word} é {i}"} for i in range(count)]


def texts(word: str, count: int = 5) -> list[str]:
    return [row["text"] for row in rows(word, count)]


def stream(name: str) -> list[str]:
    return list(read_text(name))


def load(name: str) -> list[str]:
    return list(read_rows([name])["text"])


READERS = pytest.mark.parametrize(("read", "option"), [(stream, "--calibration"), (load, "--data")])
Read = Callable[[str], list[str]]


def refusal(read: Read, name: str, option: str) -> str:
    """Why a name is not read, after the option and the name."""
    with pytest.raises(OptionError) as caught:
        read(name)
    said, _, why = str(caught.value).partition(": ")
    assert said == f"{option} {name}"
    return why


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No other host is so much as looked up."""
    found, look_up = set(), socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: found.add(host) or look_up(host, *rest, **more)
    )
    yield
    assert found <= {"127.0.0.1"}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """An empty Hub, with the library and an empty cache before it."""
    with serve(Hub()) as served, datasets_of(served.endpoint, tmp_path / "hf"):
        served.tokens.add(STRANGER)
        yield served


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """A repository with two splits, a file of JSON lines each."""
    folder = tmp_path / "lines"
    folder.mkdir()
    for split in ("test", "train"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(split)))
    return folder


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """A repository with two configurations of Parquet files, of which one has no split to train on."""
    folder = tmp_path / "tables"
    for name, word in {"plain": "plain", "marked": "marked held", "marked/more": "marked"}.items():
        (folder / name).mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(word)), folder / name / "0.parquet")
    (folder / "README.md").write_text(CARD)
    return folder


def contents(hub: Hub) -> set[str]:
    """The files whose content was asked for."""
    found = [r.path for r in hub.requests if r.method == "GET" and "/resolve/" in r.path]
    return {path.partition("/resolve/")[2].partition("/")[2] for path in found}


# What is read


@pytest.mark.parametrize("read", [stream, load])
def test_the_training_split_is_read(read: Read, hub: Hub, lines: Path) -> None:
    hub.add("datasets/user/lines", lines)
    assert read("user/lines") == texts("train")
    assert contents(hub) == ({"train.jsonl"} if read is stream else {"train.jsonl", "test.jsonl"})


@READERS
def test_a_configuration_is_read(read: Read, option: str, hub: Hub, tables: Path) -> None:
    hub.add("datasets/user/tables", tables)
    assert read("user/tables:marked") == texts("marked")
    assert "plain/0.parquet" not in contents(hub)
    assert "['plain', 'marked']" in refusal(read, "user/tables", option)
    assert "['plain', 'marked']" in refusal(read, "user/tables:other", option)


def test_without_a_training_split_the_first_is_streamed_and_one_is_to_be_named(hub: Hub, tables: Path) -> None:
    hub.add("datasets/user/tables", tables)
    assert stream("user/tables:plain") == texts("plain")
    assert "Should be one of ['held']" in refusal(load, "user/tables:plain", "--data")
    assert load("user/tables:plain@held") == texts("plain")


def test_any_split_or_a_slice_of_it_is_loaded(hub: Hub, lines: Path, tables: Path) -> None:
    hub.add("datasets/user/lines", lines)
    hub.add("datasets/user/tables", tables)
    assert load("user/lines@test") == texts("test")
    assert load("user/lines@test[1:3]") == texts("test")[1:3]
    assert load("user/lines@train[:40%]") == texts("train")[:2]
    assert load("user/tables:marked@held") == texts("marked held")


def test_it_is_streamed_with_one_look_at_the_repository(hub: Hub, lines: Path) -> None:
    hub.add("datasets/user/lines", lines)
    stream("user/lines")
    assert len([r for r in hub.requests if r.path.endswith("/dataset_infos.json")]) == 1


@pytest.mark.parametrize("read", [stream, load])
def test_what_the_library_asks_of_other_hosts_comes_here(read: Read, hub: Hub, lines: Path) -> None:
    hub.add("datasets/user/lines", lines)
    read("user/lines")
    host = hub.endpoint.removeprefix("http://")
    asked = {(r.method, r.path) for r in hub.requests if not r.path.startswith("/")}
    assert asked == {
        ("CONNECT", "s3.amazonaws.com:443"),
        ("GET", f"http://datasets-server.{host}/info?dataset=user/lines"),
    }


# Who may read it


@READERS
@pytest.mark.parametrize("closed", [{"private": True}, {"gated": True}], ids=lambda closed: next(iter(closed)))
def test_what_is_closed_opens_to_its_token(
    closed: Mapping[str, Any], read: Read, option: str, hub: Hub, lines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("datasets/user/lines", lines, token=TOKEN, **closed)
    for token in ("", STRANGER):
        monkeypatch.setenv("HF_TOKEN", token)
        why = refusal(read, "user/lines", option)
        assert why.startswith("no such file here, and no such data set on the Hub: check the name; if it is ")
        assert why.endswith("log in with `hf auth login`")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.requests.clear()
    assert read("user/lines") == texts("train")
    assert {r.token for r in hub.requests if r.path.startswith(("/datasets/", "/api/datasets/"))} == {TOKEN}


@READERS
def test_what_does_not_exist_is_refused(read: Read, option: str, hub: Hub, lines: Path) -> None:
    hub.add("user/lines", lines)  # a model of this name
    assert "no such file here, and no such data set on the Hub" in refusal(read, "user/lines", option)
    assert not contents(hub)


@READERS
def test_a_token_that_the_hub_or_no_header_takes(
    read: Read, option: str, hub: Hub, lines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("datasets/user/lines", lines)
    monkeypatch.setenv("HF_TOKEN", "hf_Unknown")
    assert refusal(read, "user/lines", option) == "the Hub refuses the token: log in again with `hf auth login`"
    monkeypatch.setenv("HF_TOKEN", "hf_Secreté")
    with pytest.raises(OptionError, match="the Hub token contains invalid characters") as caught:
        read("user/lines")
    assert "Secret" not in str(caught.value)


# What is refused


@READERS
def test_what_lies_here_is_no_data_set(
    read: Read, option: str, hub: Hub, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "user").mkdir()
    lines.rename(tmp_path / "user" / "lines")
    (tmp_path / "diary.txt").write_text("not to be learned\n")
    monkeypatch.chdir(tmp_path)
    for name in ("text", "json:default", "lines"):  # the first two are readers of the library
        assert refusal(read, name, option).startswith(
            "no such file, and not the name of a data set on the Hub (OWNER/NAME[:CONFIG]"
        )
    assert refusal(read, "user/lines:default", option).startswith("user/lines is a folder here")
    assert hub.requests == []


@READERS
def test_files_that_make_no_sense_are_refused_with_the_reason(read: Read, option: str, hub: Hub, lines: Path) -> None:
    (lines / "train.jsonl").write_text('{"text": "x"}\n{"te')
    hub.add("datasets/user/lines", lines)
    assert "JSON parse error" in refusal(read, "user/lines", option)
    for path in lines.iterdir():
        path.unlink()
    (lines / "photo.xyz").write_bytes(b"x")
    hub.add("datasets/user/other", lines)
    assert "No (supported) data files found in user/other" in refusal(read, "user/other", option)


@READERS
def test_a_hub_that_cannot_be_reached(read: Read, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between the client's attempts
    with serve(Hub()) as gone:
        pass
    with datasets_of(gone.endpoint, tmp_path / "hf"):
        why = refusal(read, "user/lines", option)
    assert why.startswith(
        "no such file here, and reading it from the Hub failed: Couldn't reach 'user/lines' on the Hub"
    )
