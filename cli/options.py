"""Options of the commands: made from the settings that declare them, and shown in groups by `--help`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import click

from loftq.errors import LoftQError
from loftq.formats.schema import parse_json
from loftq.settings import GROUPS, Declared, declared, from_dict, split

from .output import Context

_PATHS = ("DIR", "DIR|REPO_ID", "FILE", "TEXT", "MODEL")  # metavars of what may be a file or a folder
_Command = TypeVar("_Command", bound=Callable[..., Any])
Decorator = Callable[[_Command], _Command]


class Option(click.Option):
    """An option that knows the group under which `--help` shows it."""

    def __init__(self, *arguments: Any, group: str = "run", **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.group = group


class Command(click.Command):
    """A command whose `--help` shows its options in groups."""

    context_class = Context

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """One section for each group that has options."""
        options = [one for one in self.get_params(context) if isinstance(one, click.Option)]
        shown = [(one, one.get_help_record(context)) for one in options]
        for group in GROUPS:
            records = [record for one, record in shown if record and getattr(one, "group", GROUPS[-1]) == group]
            if records:
                with formatter.section(f"{group.capitalize()} options"):
                    formatter.write_dl(records)


def option(*names: str, group: str = "run", **keywords: Any) -> Decorator[Any]:
    """An option that no settings class declares."""
    return click.option(*names, cls=Option, group=group, **keywords)


def options_of(*classes: type, only: Collection[str] = (), without: Collection[str] = ()) -> Decorator[Any]:
    """All options of settings classes, or `only` some of them. What is not given on the command line is None or ()."""

    def decorate(command: _Command) -> _Command:
        for entry in reversed([entry for settings in classes for entry in declared(settings).values()]):
            if not entry.setting.hidden and entry.name not in without and (not only or entry.name in only):
                command = _option(entry)(command)
        return command

    return decorate


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that stand on the command line."""
    chosen = {name: value for name, value in options.items() if value not in (None, ())}
    return {**chosen, "quiet": bool(options["quiet"])} if "quiet" in options else chosen  # Python is quiet unless told


def check_options(options: dict[str, Any], *classes: type) -> None:
    """Raise OptionError for a value that settings refuse, before anything that takes seconds is imported."""
    for settings, values in zip(classes, split(options, *classes), strict=True):
        from_dict(settings, values)


def names_of(table: Collection[str]) -> Any:
    """What completes an option or an argument to the names of a table."""
    return lambda _context, _option, typed: [name for name in table if name.startswith(typed)]


def _option(entry: Declared) -> Decorator[Any]:
    declaration = entry.setting
    keywords: dict[str, Any] = {"help": _help(entry), "default": None, "metavar": declaration.metavar}
    names = [entry.option, entry.name]
    if entry.type is bool:
        keywords["is_flag"] = True
        names[0] += f"/--no-{entry.option[2:]}" if declaration.negative else ""
    elif entry.type is dict:
        keywords |= {"multiple": True, "type": _value if declaration.json_values else _assignment}
    elif entry.type is tuple and declaration.repeated:
        keywords["multiple"] = True
    else:
        keywords["type"] = comma_names if entry.type is tuple else entry.type
    if declaration.choices:
        keywords["shell_complete"] = names_of(declaration.choices)
    elif entry.type is str and declaration.metavar in _PATHS:
        keywords["type"] = click.Path()  # a shell completes it to files
    return option(*names, group=declaration.group, **keywords)


def _help(entry: Declared) -> str:
    usual = entry.setting.usual
    if usual is None and entry.type is not bool and entry.default not in (None, (), {}):
        usual = f"{entry.default:g}" if isinstance(entry.default, float) else str(entry.default)
    return f"{entry.setting.help}  [default: {usual}]" if usual else entry.setting.help


def comma_names(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """Names with commas or blanks between them, as a tuple; a default is one already."""
    return value if isinstance(value, tuple) else tuple(value.replace(",", " ").split())


def _assignment(value: str | tuple[str, str]) -> tuple[str, str]:
    """NAME=VALUE, in two."""
    if isinstance(value, tuple):
        return value
    name, equals, rest = value.partition("=")
    if not equals or not name or not rest:
        raise ValueError
    return name.strip(), rest.strip()


def _value(value: str | tuple[str, Any]) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON where it is JSON, as a text otherwise."""
    name, text = _assignment(value)
    try:
        return name, parse_json(text, name, object)
    except (LoftQError, TypeError):
        return name, text


as_json = option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
debug = option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")  # read by `main`
wide = option("--wide", is_flag=True, help="Show all columns, and each row on one line.")
quiet = option("--quiet", is_flag=True, help="Show no progress bar.")
token = option("--token", group="hub", help="Hub token; better: `hf auth login`.")
trust_remote_code = option(
    "--trust-remote-code", group="model", is_flag=True, help="Run the Python code that the model brings."
)
overwrite = option("--overwrite", group="output", is_flag=True, help="Replace what is there.")
resume = option("--resume", group="output", is_flag=True, help="Finish an interrupted run.")
