"""The folder of a training: one writer, a disk that is full. Oracle: the run in one piece, and what the system says."""

from __future__ import annotations

import errno
import importlib
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rows import sums, write_rows
from safetensors.torch import load_file

import loftq
from loftq.errors import OutputError
from loftq.models.adapters import TRAINING_RECORD
from loftq.training import run_folder
from loftq.training.run_folder import explain_write_errors, sole_writer, write_record

Run = Callable[..., Any]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def artifact(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    importlib.import_module("loftq.training.train")  # which writes files of its own when it is imported first
    folder = tmp_path_factory.mktemp("artifact") / "out"
    return loftq.quantize(str(pico), output=folder, rank=4, iters=1, quiet=True).folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "sums.jsonl", sums(8))


@pytest.fixture
def asked(artifact: Path, data: Path, tmp_path: Path) -> list[Any]:
    """A training of two steps, each with a checkpoint."""
    steps = ["--max-steps", 2, "--save-steps", 1, "--set", "eval_strategy=no", "--batch-size", 2]
    return ["train", artifact, "--data", data, "--output", tmp_path / "out", *steps, "--cutoff-len", 32, "--quiet"]


# One writer


def test_the_second_writer_is_refused_at_once(asked: list[Any], tmp_path: Path, run: Run) -> None:
    """With every option, and with an error of its own besides; the folder stays as it is."""
    out = tmp_path / "out"
    with sole_writer(out):
        write_record(out, {"settings": {}})
        before = (out / TRAINING_RECORD).read_bytes()
        for flags in ([], ["--resume"], ["--overwrite"], ["--data", tmp_path / "nothing.jsonl"]):
            refused = run(*asked, *flags)
            assert refused.exit_code == 1
            assert (
                refused.stderr == f"Error: another training is writing {out}: wait for it, or name another --output\n"
            )
    assert (out / TRAINING_RECORD).read_bytes() == before


def test_a_killed_writer_holds_nothing(tmp_path: Path) -> None:
    """A fork of this process holds the lock until it is killed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with sole_writer(tmp_path / "out"):
                os.write(writer, b"locked")
                signal.pause()
        finally:
            os._exit(1)
    assert os.read(reader, 6) == b"locked"
    with pytest.raises(OutputError, match="another training is writing"), sole_writer(tmp_path / "out"):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(reader)
    os.close(writer)
    with sole_writer(tmp_path / "out"):
        pass


def test_of_several_processes_the_first_one_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sole_writer(tmp_path / "out"):
        monkeypatch.setenv("RANK", "1")
        with sole_writer(tmp_path / "out"):
            pass


def test_a_refused_training_leaves_no_folder(asked: list[Any], tmp_path: Path, run: Run) -> None:
    refused = run(*asked, "--output", tmp_path / "new" / "deep", "--column", "prompt=nothing")
    assert refused.exit_code == 2
    assert not (tmp_path / "new").exists()


# Other rows


@pytest.mark.parametrize("option", ["--data", "--eval-data"])
def test_other_rows_under_the_same_name_are_not_continued_with(
    option: str, asked: list[Any], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the rows. A record of an earlier version, which has no hashes, is continued."""
    mine = write_rows(tmp_path / "mine.jsonl", sums(8))
    asked = [*asked, option, mine] if option == "--eval-data" else [*asked[:2], "--data", mine, *asked[4:]]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*asked, "--resume").exit_code == 130
    write_rows(mine, [*sums(7), {"prompt": "What is 7+7?", "response": "It is 15."}])
    refused = run(*asked, "--resume")
    assert refused.exit_code == 1
    assert refused.stderr == (
        f"Error: {tmp_path / 'out'} was begun with other rows than {option} {mine} holds now: bring back the earlier "
        "rows, or add --overwrite instead of --resume\n"
    )
    record = json.loads((tmp_path / "out" / TRAINING_RECORD).read_text())
    del record["rows"]
    (tmp_path / "out" / TRAINING_RECORD).write_text(json.dumps(record))
    assert run(*asked, "--resume").exit_code == 0


# A full disk


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """A real limit of the system."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def check_told(ended: Any, out: Path, *words: str) -> None:
    assert ended.exit_code == 1, ended
    assert ended.stderr.startswith(f"Error: cannot write {out}"), ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert all(word in ended.stderr for word in words), ended.stderr


@pytest.mark.parametrize("limit", [20_000, 50_000])
def test_a_file_larger_than_allowed(limit: int, asked: list[Any], tmp_path: Path, run: Run) -> None:
    """Of the adapter, and of the optimizer, which torch writes."""
    with largest_file(limit):
        ended = run(*asked)
    check_told(ended, tmp_path / "out", "larger than allowed", "run again with --resume")
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert run(*asked, "--resume").exit_code == 0


@pytest.fixture(scope="module")
def whole(artifact: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The adapter of a run in one piece."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    options: dict[str, Any] = {"max_steps": 2, "save_steps": 1, "batch_size": 2, "cutoff_len": 32, "quiet": True}
    loftq.train(str(artifact), data=str(data), output=folder, set={"eval_strategy": "no"}, **options)
    return dict(load_file(folder / WEIGHTS))


@pytest.mark.parametrize("call", ["torch.save", "trainer_state", "tokenizer"])
def test_a_full_disk_keeps_the_last_checkpoint(
    call: str, asked: list[Any], whole: Any, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second checkpoint breaks off; the run goes on from the first one and ends as one in one piece."""
    save, replace, opened = torch.save, Path.write_bytes, open

    def full(path: object) -> bool:
        return "checkpoint-2" in str(path)

    def save_half(value: object, path: Any, *rest: Any, **options: Any) -> None:
        save(value, path, *rest, **options)
        if full(path):
            os.truncate(path, 100)
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 45120 vs 45012")

    def no_room(path: Path, content: bytes) -> int:
        if path.name == ".probe.partial":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(path, content)

    def open_full(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        name = {"trainer_state": "trainer_state.json", "tokenizer": "tokenizer_config.json"}.get(call, "nothing")
        if "w" in mode and full(path) and str(path).endswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return opened(path, mode, *rest, **options)

    with monkeypatch.context() as patch:
        if call == "torch.save":
            patch.setattr(torch, "save", save_half)
            patch.setattr(Path, "write_bytes", no_room)
        else:
            patch.setattr("builtins.open", open_full)
        ended = run(*asked)
    check_told(ended, tmp_path / "out", "the disk is full", "free some space", "run again with --resume")
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    resumed = run(*asked, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert "incomplete" not in resumed.stderr
    ended_in = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(whole[name], ended_in[name]) for name in whole)


def test_other_errors_are_not_explained(tmp_path: Path) -> None:
    for error in (RuntimeError("shapes differ"), OSError(errno.EBADF, "Bad file descriptor")):
        with pytest.raises(type(error)) as raised, explain_write_errors(tmp_path):
            raise error
        assert raised.value is error
    with (
        pytest.raises(OutputError, match=r"cannot write a whole checkpoint .*: check the disk"),
        explain_write_errors(tmp_path),
    ):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


def test_bytes_of_a_checkpoint_that_were_lost(tmp_path: Path) -> None:
    """A page of zeros in the middle of a file that torch wrote; its end is whole."""
    path = tmp_path / "optimizer.pt"
    torch.save({"state": torch.ones(50_000)}, path)
    assert run_folder._is_archive(path)
    content = bytearray(path.read_bytes())
    content[100_000:104_096] = bytes(4096)
    path.write_bytes(content)
    assert not run_folder._is_archive(path)


def test_the_record_is_strict_json(tmp_path: Path) -> None:
    write_record(tmp_path, {"history": [{"loss": float("nan"), "step": 1}], "result": {"train_loss": float("inf")}})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    record = json.loads((tmp_path / TRAINING_RECORD).read_text(), parse_constant=refuse)
    assert record == {"history": [{"loss": None, "step": 1}], "result": {"train_loss": None}}
