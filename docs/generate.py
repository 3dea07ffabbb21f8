"""The reference pages, written from the code: commands and options, public functions, methods, models.

python docs/generate.py            writes docs/reference/*.md
python docs/generate.py --check    writes nothing; exits with 1 and names every page that is not current
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner
from signatures import PublicFunction, attributes

import loftq
from loftq.errors import LoftQError
from loftq_cli.main import cli

REFERENCE = Path(__file__).parent / "reference"
_HEADER = "<!-- Written by docs/generate.py from the code. Change the code, then run `make docs`. -->\n\n"
_COMMANDS = """# Commands

These are the texts of `loftq COMMAND --help`. Options may be written with underscores (`--quant_type`). Exit codes:
0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""
_PYTHON = """# Python

Everything here is an attribute of `loftq`. A function that has a command of the same name takes the same settings and
returns what the command prints.
"""
_METHODS = """# Methods

`loftq methods` prints the same table of `loftq quantize --method`. “Iterations” counts the alternations of rounding and
adapter, “refine” the training steps in which the adapter is distilled.

"""
_FAMILIES = """# Model types

`loftq families` prints the same table. Tests write its rows: they make a small model of each type, quantize it, and
look at what comes out. “Loads with” says whether stock transformers and peft load the default format (“stock”), or
need `import loftq` first (“loftq”). “Nearer” says whether the adapter brings the outputs nearer to those of the
full-precision model, “trains” whether every factor of the adapter, or a part of them, gets a gradient. “Calibrates”
says what a calibrated start can use: text, text that reaches only a part of the linears (“partly”), or nothing. “In
16 bits” is the share of the weights that is not quantized, in a model of the size that the type has by default.
Embeddings, norms and heads always stay unquantized.

"""


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or with --check only compare them. Returns the exit code."""
    pages = {REFERENCE / name: _HEADER + write() for name, write in PAGES.items()}
    stale = [path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        for path in stale:
            print(f"{path} is not current: run `make docs` and commit it", file=sys.stderr)
        return 1 if stale else 0
    REFERENCE.mkdir(exist_ok=True)
    for path in stale:
        path.write_text(pages[path], encoding="utf-8")
    return 0


def commands_page() -> str:
    """Every command with all of its options, in the words of `--help`."""
    return _COMMANDS + "".join(_command(context) for context in _contexts(_root()))


def api_page() -> str:
    """Every public name with its signature and docstring."""
    return _PYTHON + "".join(_public(name) for name in loftq.__all__)


def methods_page() -> str:
    """The table of `loftq methods`."""
    methods: dict[str, dict[str, Any]] = json.loads(_output("methods", "--json"))
    head = ["method", *(column.replace("calibrated", "needs text") for column in next(iter(methods.values())))]
    return _METHODS + _table(head, ([f"`{name}`", *row.values()] for name, row in methods.items()))


def families_page() -> str:
    """The table of `loftq families`."""
    keys = ("model type", "loader", "nearer", "trains", "calibrates", "kept", "tasks", "stays", "targets")
    head = ("model type", "loads with", "nearer", "trains", "calibrates", "in 16 bits", "tasks", "stays unquantized")
    rows = json.loads(_output("families", "--json"))
    refused = "".join(f"- {row['model type']}: {row['refused']}\n" for row in rows if row["refused"])
    table = _table((*head, "targets"), ([_share(row[key]) for key in keys] for row in rows))
    return f"{_FAMILIES}{table}" + (f"\nThese types are refused:\n\n{refused}" if refused else "")


def _share(value: Any) -> Any:
    return "" if value is None else f"{value:.0%}" if isinstance(value, float) else value


def zoo_page() -> str:
    """The page of the zoo, which `model_zoo/README.md` is too."""
    return _output("zoo", "list", "--markdown")


PAGES: dict[str, Callable[[], str]] = {
    "commands.md": commands_page,
    "api.md": api_page,
    "methods.md": methods_page,
    "families.md": families_page,
    "zoo.md": zoo_page,
}


def _root() -> click.Context:
    return click.Context(cli, info_name="loftq", **cli.context_settings)


def _contexts(parent: click.Context) -> Iterator[click.Context]:
    """The context of every command below one, a group's own commands after it."""
    group = parent.command
    for name in group.list_commands(parent) if isinstance(group, click.Group) else ():
        command = group.get_command(parent, name)
        context = click.Context(command, info_name=name, parent=parent, **command.context_settings)
        yield context
        yield from _contexts(context)


def _command(context: click.Context) -> str:
    """A section: usage, explanation, options by group, examples."""
    command = context.command
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(context):
        name, text = parameter.get_help_record(context) or ("", "")
        if name and isinstance(parameter, click.Option):
            group = str(getattr(parameter, "group", None) or "Options")
            groups.setdefault(group, []).append((f"`{name}`", _escaped(text)))
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    level = "#" * len(context.command_path.split())
    section = f"\n{level} {context.command_path}\n\n```text\n{usage}\n```\n\n{_paragraphs(command.help)}"
    for group, rows in groups.items():
        section += f"\n**{group}**\n\n" if len(groups) > 1 else "\n"
        section += _table(["option", "meaning"], rows)
    return section + (f"\n{_paragraphs(command.epilog)}" if command.epilog else "")


def _public(name: str) -> str:
    thing = getattr(loftq, name)
    section = f"\n## loftq.{name}\n\n"
    explanation = _paragraphs(inspect.getdoc(thing))
    if isinstance(thing, type) and issubclass(thing, LoftQError):
        return f"{section}{explanation}\n{_table(['error', 'exit code', 'meaning'], _errors(thing))}"
    function = PublicFunction(f"loftq.{name}", thing)
    section += f"```python\n{function.text}\n```\n\n{explanation}"
    helps = _option_helps(name)
    rows = [(f"`{keyword}`", _escaped(helps[keyword])) for keyword in function.keywords if helps.get(keyword)]
    section += f"\n{_table(['keyword', 'meaning'], rows)}" if rows else ""
    if function.result is not None:
        rows = [(f"`{attribute}`", text) for attribute, text in attributes(function.result)]
        section += f"\nAttributes of `{function.result.__name__}`:\n\n{_table(['attribute', 'type or meaning'], rows)}"
    return section


def _option_helps(name: str) -> dict[str, str]:
    """The help of each option of a command, by the keyword that the function of the same name has for it."""
    for context in _contexts(_root()):
        if context.command_path == f"loftq {name}":
            records = {p.name: p.get_help_record(context) for p in context.command.get_params(context)}
            return {str(key): record[1] for key, record in records.items() if record}
    return {}


def _errors(root: type[LoftQError], depth: int = 0) -> Iterator[tuple[str, str, str]]:
    summary = " ".join((inspect.getdoc(root) or "").partition("\n\n")[0].split())
    yield f"{'&emsp;' * depth}`{root.__name__}`", str(root.exit_code), summary
    for kind in root.__subclasses__():
        if kind.__module__ == LoftQError.__module__:
            yield from _errors(kind, depth + 1)


def _output(*arguments: str) -> str:
    return CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout


def _paragraphs(text: str | None) -> str:
    """A help text or docstring as Markdown. Paragraphs that click does not wrap become blocks of text."""
    paragraphs = inspect.cleandoc((text or "").replace("\f", "")).split("\n\n")
    blocks = [f"```text\n{p[2:]}\n```" if p.startswith("\b\n") else _escaped(p) for p in paragraphs]
    return "\n\n".join(blocks) + "\n"


def _escaped(text: str) -> str:
    """Text outside of backticks whose characters mean nothing to Markdown."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*<])", r"\\\1", part) for part in parts)


def _table(head: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [head, ["---"] * len(head), *(map(_cell, row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = ", ".join(value) if isinstance(value, list) else str(value)
    return (text.replace("*", r"\*") if isinstance(value, list) else text).replace("|", r"\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
