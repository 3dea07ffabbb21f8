"""Writes the command that makes an artifact again, for its card, from the settings of the user."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from loftq.hub.source import Source
from loftq.hub.text import public_name
from loftq.planning.recipe import Recipe
from loftq.planning.settings import QuantizeSettings
from loftq.settings import declared, said

_WIDTH = 100
_ALWAYS = ("bits", "rank")


def command_line(recipe: Recipe, source: Source) -> str:
    """Return `loftq quantize …` with bits, rank, and every setting of the user that differs from its default.

    Lines are at most about 100 characters long.
    """
    always = _ALWAYS if recipe.backbone is None else ("rank",)
    values = {name: getattr(recipe.requested, name) for name in always} | said(recipe.requested)
    if recipe.backbone is not None and Path(recipe.backbone).exists():
        values["backbone"] = Path(recipe.backbone).name
    if recipe.calibration is not None:
        values["calibration"] = public_name(recipe.calibration)
    words = [_option(name, value) for name, value in values.items()]
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


def _option(name: str, value: Any) -> str:
    option = declared(QuantizeSettings)[name].option
    if value is True:
        return option
    if isinstance(value, list):
        value = ",".join(value)
    return f"{option} {shlex.quote(f'{value:g}' if isinstance(value, float) else str(value))}"
