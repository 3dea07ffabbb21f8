"""The n-th system call fails: one line, nothing half-written in place, and the same bytes afterwards.

Oracles: the files of an undisturbed run to the same path, and the message of the operating system.
"""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Result
from folders import Files, hashes, opens

import loftq
from loftq.artifacts import staging
from loftq.errors import LoftQError

CALLS = [
    *(
        (os, name)
        for name in ("open", "write", "pwrite", "pread", "fsync", "fdatasync", "ftruncate", "posix_fallocate")
    ),
    *((os, name) for name in ("replace", "rename", "unlink", "mkdir", "rmdir", "truncate")),
    *((io, "open"), (shutil, "copyfile")),
]
WORDS = {
    errno.EIO: "input/output error",
    errno.ENOSPC: "the disk is full",
    errno.EMFILE: "too many files are open in this process: raise the limit with `ulimit -n",
}
SETTINGS = ("--rank", 4, "--iter", 1, "--max-shard-size", "60KB", "--workers", 1, "--quiet")
Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _noted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "EVERY", 0)


@contextmanager
def failing(root: Path, number: int, error: int) -> Iterator[list[str]]:
    """The `number`-th call on a file under a folder fails, and none after it. Yields the names of the calls."""
    seen: list[str] = []

    def wrapped(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(target: Any, *arguments: Any, **options: Any) -> Any:
            try:
                path = Path(f"/proc/self/fd/{target}").readlink() if isinstance(target, int) else Path(target)
            except OSError:
                path = Path()
            if path.is_relative_to(root) or (arguments and str(arguments[0]).startswith(str(root))):
                seen.append(name)
                if len(seen) == number:
                    raise OSError(error, os.strerror(error), str(path))
            return original(target, *arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in CALLS:
            patch.setattr(owner, name, wrapped(getattr(owner, name), name))
        yield seen


def check(ended: Result, out: Path, error: int, expected: Files, where: str) -> None:
    """One line with the cause; or the call did not matter, and all is there."""
    if ended.exit_code == 0:
        assert hashes(out) == expected, where
        return
    assert ended.exit_code == 1, (where, ended)
    assert ended.stderr.startswith("Error: "), (where, ended)
    assert ended.stderr.count("\n") == 1, (where, ended)
    assert WORDS[error] in ended.stderr.lower(), (where, ended)
    assert not opens(out) or hashes(out).items() >= expected.items(), where


def try_calls(command: Callable[..., Result], out: Path, count: int | None) -> None:
    with failing(out.parent, 0, 0) as seen:
        assert command().exit_code == 0
    expected = hashes(out)
    draw = random.Random(len(seen))
    numbers = range(1, len(seen) + 1) if count is None else draw.sample(range(1, len(seen) + 1), count)
    for number in numbers:
        shutil.rmtree(out)
        error = draw.choice(list(WORDS))
        where = f"{errno.errorcode[error]} from call {number} of {len(seen)}: {seen[number - 1]}"
        with failing(out.parent, number, error):
            ended = command()
        check(ended, out, error, expected, where)
        if ended.exit_code:
            again = command("--resume")
            assert again.exit_code == 0, (where, again)
        assert hashes(out) == expected, where


@pytest.mark.parametrize("count", [14, pytest.param(None, marks=pytest.mark.slow)])
def test_a_call_of_quantize_fails(count: int | None, run: Run, pico: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "out"
    out.parent.mkdir()
    try_calls(lambda *flags: run("quantize", pico, "--output", out, *SETTINGS, *flags), out, count)


@pytest.fixture(scope="module")
def artifact(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options: dict[str, Any] = {"adapter": "qalora", "group_size": 16, "rank": 2, "quiet": True}
    return loftq.quantize(str(pico), output=tmp_path_factory.mktemp("failing") / "artifact", **options).folder


@pytest.mark.parametrize("to", ["int", "lora"])
@pytest.mark.parametrize("count", [6, pytest.param(None, marks=pytest.mark.slow)])
def test_a_call_of_merge_fails(count: int | None, to: str, run: Run, artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "out"
    out.parent.mkdir()
    merge = ("merge", artifact, "--to", to, "--output", out, "--no-check", "--quiet")
    try_calls(lambda *flags: run(*merge, *flags), out, count)


@pytest.mark.parametrize("count", [5, pytest.param(None, marks=pytest.mark.slow)])
def test_a_call_of_train_fails(count: int | None, run: Run, pico: Path, tmp_path: Path) -> None:
    """Oracle: the factors of an undisturbed training. The record has times, so it is not compared."""
    out, data = tmp_path / "results" / "out", tmp_path / "a.txt"
    out.parent.mkdir()
    data.write_text("hello world, hello world\n" * 40)
    model = loftq.quantize(str(pico), output=tmp_path / "artifact", rank=2, iters=1, quiet=True).folder
    train = ("train", model, "--task", "clm", "--data", data, "--output", out, "--cpu", "--quiet")
    train = (*train, "--cutoff-len", 16, "--max-steps", 2, "--save-steps", 1, "--eval-steps", 2)
    with failing(out.parent, 0, 0) as seen:
        assert run(*train).exit_code == 0
    factors = (out / "adapter_model.safetensors").read_bytes()
    draw = random.Random(0)
    numbers = range(1, len(seen) + 1) if count is None else draw.sample(range(1, len(seen) + 1), count)
    for number in numbers:
        shutil.rmtree(out)
        error = draw.choice(list(WORDS))
        where = f"{errno.errorcode[error]} from call {number} of {len(seen)}: {seen[number - 1]}"
        with failing(out.parent, number, error):
            ended = run(*train)
        if ended.exit_code:
            assert (ended.exit_code, ended.stderr.count("\n")) == (1, 1), (where, ended)
            assert WORDS[error] in ended.stderr.lower(), (where, ended)
            again = run(*train, *(["--resume"] if (out / "training.json").is_file() else []))
            assert again.exit_code == 0, (where, again)
        assert (out / "adapter_model.safetensors").read_bytes() == factors, where


def test_a_call_of_push_fails_while_it_reads(artifact: Path) -> None:
    """Nothing is sent: the folder is read before the Hub is asked anything."""
    for number, error in enumerate(WORDS, start=3):
        with failing(artifact, number, error), pytest.raises(LoftQError, match=rf"cannot read .*{WORDS[error]}"):
            loftq.push(artifact, "me/model", token="hf_x")
