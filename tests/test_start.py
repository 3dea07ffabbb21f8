"""What a command imports before it can answer, and whether what it prints fits a terminal.

Oracles: the interpreter's own list of modules; the lengths of lines; a pseudo-terminal.

Covers: loftq/__main__.py, loftq/tables.py, loftq/models/choices.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import loftq
from loftq.display import line_width
from loftq.formats.layouts import LAYOUTS
from loftq.merging.targets import TARGETS
from loftq.tables import LazyTable
from loftq_cli.output import fitting_lines

Run = Callable[..., Any]
HEAVY = ("torch", "transformers", "peft", "numba", "scipy", "numpy", "bitsandbytes", "datasets", "accelerate")
_NAMES = ("loftq_cli.main", "loftq")
PROGRAM = """
import contextlib, io, json, os, sys
from loftq_cli.main import cli, main

def words_of(group, context):
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield [name]
        if hasattr(command, "list_commands"):
            yield from ([name, *words] for words in words_of(command, context))

def answer(words, **environment):
    os.environ.update(environment)
    written = io.TextIOWrapper(io.BytesIO())
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
        try:
            main(words)
            code = 0
        except SystemExit as stop:
            code = stop.code
    for name in environment:
        del os.environ[name]
    written.flush()
    return [" ".join(words), code, written.buffer.getvalue().decode(), [name for name in HEAVY if name in sys.modules]]

answers = [answer([*words, "--help"]) for words in words_of(cli, None)]
answers += [answer(words.split()) for words in WRONG]
answers += [answer([], _LOFTQ_COMPLETE="bash_complete", COMP_WORDS="loftq " + words, COMP_CWORD=str(len(words.split())))
            for words in TYPED]
print(json.dumps(answers))
"""
WRONG = {  # lines of usage that are refused, and a part of the message
    "quantize model --method lotfq": "did you mean loftq",
    "quantize model --rank 0": "expected 1 or more",
    "quantize model --rnak 4": "No such option",
    "train model --data rows.jsonl --output out --task stf": "did you mean sft",
    "train model": "no data is given",
    "evaluate model": "--data",
    "evaluate model --data x.txt --batch-size 0": "expected 1 or more",
    "merge folder --to bf61 --output out": "did you mean bf16",
    "merge folder --to gptq --output out --rank 0": "expected 1 or more",
    "generate": "Missing argument",
    "chat": "Missing argument",
    "sweep model --method lotfq": "did you mean loftq",
    "push folder": "Missing argument",
    "config folder --for axolot": "did you mean axolotl",
    "config folder --for axolotl --stage dpo": "it ignores lora_model_dir",
    "zoo build nothing": "unknown recipe",
}
TYPED = {  # words before the cursor, and what completes the last of them
    "quantize --method cal": "calibrated",
    "quantize --format gp": "gptq",
    "config my-model --for llama": "llama-factory",
    "zoo build qwen3-1": "qwen3-14b",
    "zoo show llama-2-7": "llama-2-7b",
    "families distil": "distilbert",
    "merge x --to compressed": "compressed-tensors",
    "train --task gsm": "gsm8k",
    "evaluate --task perp": "perplexity",
}


@pytest.fixture(scope="module")
def answers() -> Mapping[str, tuple[int, str, list[str]]]:
    """What one process answers to all of these, with the libraries that it has imported by then."""
    code = f"HEAVY, WRONG, TYPED = {HEAVY!r}, {list(WRONG)!r}, {list(TYPED)!r}\n{PROGRAM}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    lines = json.loads(found.stdout)
    assert len({words for words, *_ in lines if words.endswith("--help")}) > 15
    completed = iter(TYPED)
    return {words or next(completed): (code, text, heavy) for words, code, text, heavy in lines}


def test_help_refusals_and_completion_import_nothing_that_takes_seconds(answers: Mapping[str, Any]) -> None:
    for words, (code, text, heavy) in answers.items():
        assert heavy == [], f"loftq {words} imports {heavy}: {text}"
        if words.endswith("--help"):
            assert (code, text[:6]) == (0, "Usage:"), words


def test_an_inspection_imports_no_torch(pico: Path, tmp_path: Path) -> None:
    folder = loftq.quantize(str(pico), bits=2, rank=2, iters=1, output=tmp_path / "out", quiet=True).folder
    code = f"from loftq_cli.main import cli; cli(['inspect', {str(folder)!r}], standalone_mode=False)"
    shown = "import sys; print('imports', [name for name in ('torch', 'transformers', 'scipy') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", f"{code}; {shown}"], capture_output=True, text=True)
    assert "nf2, block size 64" in found.stdout
    assert found.stdout.splitlines()[-1] == "imports []"


@pytest.mark.parametrize("words", WRONG)
def test_wrong_usage_is_refused(words: str, answers: Mapping[str, Any]) -> None:
    code, text, _ = answers[words]
    assert code == 2
    assert WRONG[words] in text


@pytest.mark.parametrize("words", TYPED)
def test_names_are_completed(words: str, answers: Mapping[str, Any]) -> None:
    assert answers[words][1].splitlines()[-1] == f"plain,{TYPED[words]}"


@pytest.mark.parametrize("words", [["families"], ["methods"], ["zoo", "list"], ["doctor"]])
def test_tables_fit_a_terminal_or_are_wide(words: list[str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = run(*words).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    wide = run(*words, "--wide").stdout.splitlines()
    assert len(wide) <= len(lines)
    if words != ["zoo", "list"]:
        assert max(map(len, wide)) > 80
    assert "".join(lines).split()[0] == "".join(wide).split()[0]


def test_results_are_whole_rows_outside_of_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes elsewhere has a width only if COLUMNS names one."""
    monkeypatch.delenv("COLUMNS", raising=False)
    with fitting_lines():
        assert line_width.get() is None
    monkeypatch.setenv("COLUMNS", "60")
    with fitting_lines():
        assert line_width.get() == 60
        with fitting_lines(wide=True):
            assert line_width.get() is None
    assert line_width.get() is None


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colour_is_for_terminals(variables: dict[str, str], coloured: bool) -> None:
    """Through `python -m loftq`, on a pseudo-terminal and on a pipe."""
    import pty

    command = [sys.executable, "-m", "loftq", "methods"]
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    environment = {**inherited, "TERM": "xterm", **variables}
    leader, follower = pty.openpty()
    subprocess.run(command, stdout=follower, env=environment, check=True)
    os.close(follower)
    shown = b""
    while b"calibrated" not in shown:
        shown += os.read(leader, 1 << 16)
    os.close(leader)
    assert (b"\x1b[1m" in shown) is coloured
    piped = subprocess.run(command, capture_output=True, env=environment, check=True).stdout
    assert b"\x1b" not in piped


def test_windows_is_refused_in_one_line() -> None:
    """With the name of the platform as Python has it there."""
    refused = "import sys; sys.platform = 'win32'; import "
    found = [subprocess.run([sys.executable, "-c", refused + name], capture_output=True, text=True) for name in _NAMES]
    assert [one.returncode for one in found] == [1, 1]
    lines = [one.stderr.splitlines() for one in found]
    assert len(lines[0]) == 1
    assert lines[0][0] == lines[1][-1].replace("ImportError", "Error")
    assert lines[0][0].startswith("Error: loftq runs on Linux and macOS: on Windows, install it in WSL")


def test_names_of_lazy_tables_are_those_of_their_rows() -> None:
    """Oracle: the name that each row has itself. One layout is another library's method, stored in its own way."""
    methods = {name: layout.METHOD for name, layout in LAYOUTS.items()}
    assert methods.pop("bitsandbytes-fsdp") == methods["bitsandbytes"]
    assert methods == {name: name for name in methods}
    assert {name: target.name for name, target in TARGETS.items()} == {name: name for name in TARGETS}
    table: LazyTable[Any] = LazyTable({"there": "json:dumps", "not there": "no_module_of_this_name"})
    assert "not there" in table
    assert "elsewhere" not in table
    assert table["there"] is json.dumps
