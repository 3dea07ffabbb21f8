"""A command that also takes the options of the scripts that people come from, word for word."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import click

from loftq.planning.synonyms import OPTIONS, SYNONYMS, translated

from .options import Command

_log = logging.getLogger("loftq.cli")
_SEEN = ("output", "data", "task", "report_to")  # our own options on which a translation depends


class TranslatingCommand(Command):
    """Options that it does not have are translated by the table of synonyms before the others are read."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Translate, tell what was left out, and read the arguments."""
        own = {name.lstrip("-").replace("-", "_") for one in self.params for name in (*one.opts, *one.secondary_opts)}
        others, rest = _divided(args, own)
        given = {name: value for name, value in _read(rest) if name in _SEEN}
        if not others:
            return super().parse_args(context, args)
        settings, notes = translated({**others, **given})
        for note in notes:
            _log.info(note)
        words = [str(settings.pop("model"))] if "model" in settings else []
        arguments = [word for name, value in settings.items() if name not in given for word in _written(name, value)]
        return super().parse_args(context, [*words, *arguments, *rest])


def _divided(args: Sequence[str], own: set[str]) -> tuple[dict[str, Any], list[str]]:
    """The options of other scripts with their values, and the other arguments as they are."""
    others: dict[str, Any] = {}
    rest: list[str] = []
    words = list(args)
    while words:
        word = words.pop(0)
        name, equals, inline = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        row = SYNONYMS.get(name)
        follows = bool(words) and not words[0].startswith("--")
        value = inline if equals else words[0] if follows else None
        known = row is not None or (name in OPTIONS and (name not in own or OPTIONS[name](value)))
        if not word.startswith("--") or not known:
            rest.append(word)
            continue
        is_flag = (row is not None and row.flag) or (name == "push_to_hub" and value is None)
        if is_flag and not (follows and words[0].lower() in ("true", "false")):
            others[name] = True
            continue
        if value is None:
            raise click.UsageError(f"Option '{word}' requires an argument.")
        if not equals:
            words.pop(0)
        others[name] = value.lower() == "true" if is_flag else value
    return others, rest


def _read(rest: Sequence[str]) -> list[tuple[str, str]]:
    """The options among our own arguments that are followed by a value."""
    pairs = zip(rest, [*rest[1:], ""], strict=True)
    return [(word[2:].replace("-", "_"), value) for word, value in pairs if word.startswith("--")]


def _written(name: str, value: Any) -> list[str]:
    """A setting as arguments of the command line."""
    option = f"--{name.replace('_', '-')}"
    if name == "set":
        return [word for key, part in value.items() for word in (option, f"{key}={part}")]
    return [] if value is False else [option] if value is True else [option, str(value)]
