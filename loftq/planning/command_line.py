"""The command that makes an artifact again, for its card."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from loftq.errors import OptionError
from loftq.hub.source import Source
from loftq.hub.text import public_name
from loftq.planning.recipe import Recipe

_WIDTH = 100
_ALWAYS = ("bits", "rank")
_OPTIONS = {"iters": "iter"}  # where the command's name is another


def command_line(recipe: Recipe, source: Source) -> str:
    """`loftq quantize …` with every setting that does not follow from the others."""
    said = {name: getattr(recipe, name) for name in _ALWAYS} | chosen(recipe)
    if recipe.calibration is not None:
        said["calibration"] = public_name(recipe.calibration)
    words = [_option(name, value) for name, value in said.items()]
    if source.revision is not None:
        words.append(f"--revision {source.revision}")
    model = shlex.quote(source.label if source.local else source.name)
    lines = [f"loftq quantize {model}"]
    for word in words:
        if len(lines[-1]) + len(word) >= _WIDTH:
            lines[-1] += " \\"
            lines.append(" ")
        lines[-1] += f" {word}"
    return "\n".join(lines)


def chosen(recipe: Recipe) -> dict[str, Any]:
    """The settings of a resolved recipe without those that it would resolve to anyway."""
    fields = dataclasses.fields(Recipe)
    said = {field.name: value for field in fields if (value := getattr(recipe, field.name)) != field.default}
    for name in list(said):
        rest = {key: value for key, value in said.items() if key != name}
        try:
            if Recipe(**rest) == recipe:
                said = rest
        except OptionError:  # what is left makes no sense without it
            continue
    return said


def _option(name: str, value: Any) -> str:
    option = f"--{_OPTIONS.get(name, name).replace('_', '-')}"
    if value is True:
        return option
    if isinstance(value, tuple):
        value = ",".join(value)
    return f"{option} {shlex.quote(f'{value:g}' if isinstance(value, float) else str(value))}"
