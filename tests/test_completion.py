"""Completion in a real shell where there is one, and by click's protocol for the others.

Covers: cli/completion.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from conftest import Result

from loftq_cli.main import cli

Run = Callable[..., Result]
SHELLS = ("bash", "zsh", "fish")


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_name_the_command_and_the_variable(shell: str, run: Run) -> None:
    result = run("completion", shell)
    assert result.exit_code == 0
    assert f"_LOFTQ_COMPLETE={shell}_complete" in result.stdout


def test_an_unknown_shell(run: Run) -> None:
    result = run("completion", "tcsh")
    assert result.exit_code == 2
    assert "'bash', 'zsh', 'fish'" in result.stderr


def complete(run: Run, monkeypatch: pytest.MonkeyPatch, shell: str, *words: str) -> list[str]:
    """What click answers, one candidate a line (zsh's take three)."""
    monkeypatch.setenv("_LOFTQ_COMPLETE", f"{shell}_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(["loftq", *words]))
    monkeypatch.setenv("COMP_CWORD", words[-1] if shell == "fish" else str(len(words)))
    result = run()
    assert result.exit_code == 0
    return result.stdout.split("\n")


@pytest.mark.parametrize("shell", SHELLS)
def test_commands_options_and_files(shell: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the commands and options that there are."""
    assert any("verify" in line for line in complete(run, monkeypatch, shell, "ver"))
    assert any("--source" in line for line in complete(run, monkeypatch, shell, "verify", "--so"))
    assert any("file" in line for line in complete(run, monkeypatch, shell, "verify", "./x"))
    assert any("zsh" in line for line in complete(run, monkeypatch, shell, "completion", "z"))


def test_all_commands_are_offered(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    names = cli.list_commands(click.Context(cli))
    assert complete(run, monkeypatch, "bash", "")[: len(names)] == [f"plain,{name}" for name in names]


IMPORTED = "import sys\nfrom loftq_cli.main import main\ntry:\n main({})\nfinally:\n print('torch' in sys.modules)"


def test_help_imports_no_command() -> None:
    """Nor does it cut a line off. Oracle: the interpreter's own list of modules."""
    found = subprocess.run([sys.executable, "-c", IMPORTED.format("['-h']")], capture_output=True, text=True)
    *lines, imported = found.stdout.splitlines()
    commands = lines[lines.index("Commands:") + 1 :]
    assert [line.split()[0] for line in commands] == cli.list_commands(click.Context(cli))
    assert all(line.endswith(".") and "..." not in line for line in commands)
    assert imported == "False"


def test_completing_a_name_imports_no_command() -> None:
    """Oracle: the interpreter's own list of modules."""
    code = IMPORTED.format("[]")
    asked = {"_LOFTQ_COMPLETE": "bash_complete", "COMP_WORDS": "loftq ver", "COMP_CWORD": "1"}
    found = subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True)
    assert found.stdout.split() == ["plain,verify", "False"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_in_bash(tmp_path: Path) -> None:
    command = tmp_path / "loftq"
    command.write_text(f"#!{sys.executable}\nfrom loftq_cli.main import main\nmain()\n")
    command.chmod(0o755)
    lines = """
        eval "$(loftq completion bash)"
        COMP_WORDS=(loftq comp); COMP_CWORD=1; _loftq_completion loftq
        echo "${COMPREPLY[@]}"
        complete -p loftq
    """
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(["bash", "-c", lines], env={**os.environ, **paths}, capture_output=True, text=True)
    assert found.stdout.splitlines() == ["completion", "complete -o nosort -F _loftq_completion loftq"], found.stderr
