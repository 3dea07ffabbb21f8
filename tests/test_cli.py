"""The command line: what it prints where, and that lines written for the original script run.

Covers: cli/main.py, cli/output.py, cli/quantize.py, loftq/planning/run.py.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loftq.errors import CheckpointError, OutputError
from loftq_cli import main as program

Run = Callable[..., Any]


def test_original_scripts_line_runs(run: Run, pico: Path, tmp_path: Path) -> None:
    options = ["--model_name_or_path", pico, "--bits", 4, "--iter", 1, "--rank", 8, "--save_dir", tmp_path]
    result = run("quantize", *options, "--token", "hf_none")
    assert result.exit_code == 0, result.stderr
    folder = tmp_path / "pico-llama-4bit-8rank"
    assert (folder / "loftq.json").is_file()
    assert str(folder) in result.stdout
    assert b"hf_none" not in b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_table_on_stdout_progress_on_stderr(run: Run, pico: Path, tmp_path: Path) -> None:
    result = run("quantize", pico, "--output", tmp_path / "out", "--rank", 4, "--iter", 1)
    for word in ("bits per weight", "error, with adapter", "peak memory", "time", "load_qlora"):
        assert word in result.stdout
    assert "w/s, " in result.stderr  # then the name of a tensor
    assert "w/s" not in result.stdout


def test_quiet(run: Run, pico: Path, tmp_path: Path) -> None:
    result = run("quantize", pico, "--output", tmp_path / "out", "--rank", 4, "--iter", 1, "--quiet")
    assert result.stderr == ""


def test_json_is_the_report(run: Run, pico: Path, tmp_path: Path) -> None:
    result = run("quantize", pico, "--output", tmp_path / "out", "--rank", 4, "--iter", 2, "--json")
    report = json.loads(result.stdout)
    manifest = json.loads((tmp_path / "out" / "loftq.json").read_text())
    assert report["totals"] == manifest["totals"]
    assert report["layers"] == manifest["layers"]
    assert report["seconds"] > 0


def test_dry_run_writes_nothing(run: Run, pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("quantize", pico, "--dry-run", "--rank", 4)
    assert result.exit_code == 0
    assert "planned" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_default_folder_is_named_after_model_bits_and_rank(
    run: Run, pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("quantize", pico, "--rank", 4, "--iter", 1).exit_code == 0
    assert (tmp_path / "model_zoo" / "loftq" / "pico-llama-4bit-4rank" / "loftq.json").is_file()


def test_patterns_with_commas(run: Run, pico: Path, tmp_path: Path) -> None:
    result = run("quantize", pico, "--output", tmp_path / "out", "--rank", 4, "--target_modules", "q_proj,v_proj")
    assert "4 linears" in result.stdout
    config = json.loads((tmp_path / "out" / "loftq_init" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize("words", [[], ["quantize"], ["push"], ["zoo"], ["zoo", "build"]])
def test_help(run: Run, words: list[str]) -> None:
    result = run(*words, "--help")
    assert result.exit_code == 0
    assert "quantize" in result.stdout or "Examples:" in result.stdout


def test_help_shows_examples_and_every_option(run: Run) -> None:
    text = run("quantize", "--help").stdout
    assert "Examples:" in text
    options = """model-name-or-path bits rank iter alpha rslora dropout double-quant block-size compute-dtype svd
        target-modules exclude-modules save-dir output device seed max-shard-size workers revision token
        trust-remote-code resume overwrite dry-run json quiet debug"""
    for option in options.split():
        assert f"--{option}" in text


def test_version_names_what_matters(run: Run) -> None:
    text = run("--version").stdout
    for name in ("loftq", "torch", "transformers", "peft", "bitsandbytes"):
        assert name in text


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        RuntimeError("unable to open shared memory: Too many open files (24)"),
        CheckpointError(
            "shard is truncated or damaged (I/O error: Too many open files (os error 24)): download it again"
        ),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_many_open_files_are_one_line(error: Exception, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever met the limit, and also as the cause of another error."""

    def fail(*_: object, **__: object) -> None:
        raise OutputError("another error") from error

    for raised in (fail, lambda *_, **__: (_ for _ in ()).throw(error)):
        monkeypatch.setattr(program._Commands, "invoke", raised)
        ended = run("inspect", "folder")
        assert (ended.exit_code, ended.stderr.count("\n")) == (1, 1)
        message = "Error: too many files are open in this process: raise the limit with `ulimit -n"
        assert ended.stderr.startswith(message)


def test_a_chain_of_errors_may_be_a_circle(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        cause = OSError(errno.EIO, "Input/output error")
        cause.__cause__ = cause
        raise OutputError("cannot write") from cause

    monkeypatch.setattr(program._Commands, "invoke", fail)
    assert run("inspect", "folder").stderr == "Error: cannot write\n"


def test_a_real_limit_of_open_files(run: Run, pico: Path, tmp_path: Path) -> None:
    """After a run that has imported all that it needs."""
    options = ["--rank", 4, "--iter", 1, "--quiet"]
    assert run("quantize", pico, "--output", tmp_path / "warm", *options).exit_code == 0
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened[0] + 4, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        ended = run("quantize", pico, "--output", tmp_path / "out", *options)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in opened:
            os.close(descriptor)
    assert (ended.exit_code, ended.stderr.count("\n")) == (1, 1), ended.stderr
    assert "too many files are open" in ended.stderr


def test_no_message_shows_a_secret(run: Run) -> None:
    """A token in the place of another argument."""
    for words in (["push", "folder", "owner/name", "hf_AbCdEfGhIjKlMnOpQr"], ["quantize", "https://me:pass@host/x"]):
        ended = run(*words)
        assert ended.exit_code != 0
        assert "hf_AbC" not in ended.stderr
        assert "pass" not in ended.stderr
        assert "***" in ended.stderr
