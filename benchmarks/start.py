"""What a person waits for before anything happens: help, completion, refusals, lists, `import loftq`; and table widths.

    python benchmarks/start.py [--repeats 5] [--before PATH_OF_ANOTHER_loftq] [--folder DIR]

The dry run is of the default model. It builds the model with transformers' class and asks peft what it can adapt, so
the line that imports both is its floor. Each line is the median of several processes in seconds, after one that warms
the disk's cache. With `--before` the same is run with another installation in turns. `--folder` is a folder that `loftq
quantize` wrote, to be inspected.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
from machine import describe, table

from loftq_cli.main import cli

REFUSED = ("quantize", "model", "--rank", "0")
TYPED = ("quantize --method cal", "merge DIR --to b", "families dist", "zoo show qwen")
TABLES = (("families",), ("methods",), ("doctor",), ("zoo", "list"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    programs = [Path(sys.executable).with_name("loftq"), *([options.before] if options.before else [])]
    lines = [[*words, "--help"] for words in commands(cli)] + [list(REFUSED), ["zoo", "list"]]
    lines += [["quantize", "--dry-run"], *([["inspect", str(options.folder)]] if options.folder else [])]
    rows = [["", *(["now", "before", "times"] if options.before else ["seconds"])]]
    for words in lines:
        rows.append([f"loftq {' '.join(words)}", *shown([[str(program), *words] for program in programs], options)])
    for typed in TYPED:
        asked = {
            "COMP_WORDS": f"loftq {typed}",
            "COMP_CWORD": str(len(typed.split())),
            "_LOFTQ_COMPLETE": "bash_complete",
        }
        rows.append([f"TAB after loftq {typed}", *shown([[str(program)] for program in programs], options, asked)])
    for code in ("import peft, transformers; transformers.LlamaForCausalLM", "import torch", "import loftq", "pass"):
        pythons = [[str(program.with_name("python")), "-c", code] for program in programs]
        rows.append([f'python -c "{code}"', *shown(pythons, options)])
    print(describe())
    print(table(rows))
    print(table([["", "columns wide at 80", "with --wide"], *([" ".join(words), *widths(words)] for words in TABLES)]))


def commands(group: click.Group) -> list[list[str]]:
    """The words of every command."""
    found = []
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        inner = commands(command) if isinstance(command, click.Group) else []
        found += [[name], *([name, *words] for words in inner)]
    return found


def shown(calls: list[list[str]], options: argparse.Namespace, more: dict[str, str] | None = None) -> list[str]:
    """The median seconds of each call, run in turns, and how many times faster the first is."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(options.repeats + 1):
        for call, times in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            subprocess.run(call, capture_output=True, env={**os.environ, **(more or {})})
            times.append(time.perf_counter() - started)
    medians = [statistics.median(times[1:]) for times in seconds]
    cells = [f"{median:.2f}" for median in medians]
    return [*cells, f"{medians[1] / medians[0]:.1f}"] if len(medians) == 2 else cells


def widths(words: tuple[str, ...]) -> list[str]:
    """The widest line of a table at 80 columns, and of all of it."""
    program = str(Path(sys.executable).with_name("loftq"))
    found = []
    for wide in ([], ["--wide"]):
        text = subprocess.run(
            [program, *words, *wide], capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}
        )
        found.append(str(max(map(len, text.stdout.splitlines()))))
    return found


if __name__ == "__main__":
    main()
