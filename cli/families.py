"""`loftq families`."""

from __future__ import annotations

from typing import Any

import click

from loftq.models import coverage
from loftq.models.families import family_of

from .options import Command, as_json, wide
from .output import echo_json, echo_table

_EPILOG = """\b
Examples:
  loftq families
  loftq families whisper
  loftq families --wide | less -S
  loftq families --json | jq '.[] | select(.loader == "loftq")'
"""
_TITLES = {"loader": "loads with", "kept": "in 16 bits"}
_FITTING = ("model type", "loads with", "nearer", "trains", "calibrates", "in 16 bits")
_OTHER = "any other"


@click.command(cls=Command, epilog=_EPILOG)
@click.argument(
    "model_type",
    required=False,
    shell_complete=lambda _context, _option, typed: [name for name in coverage.types() if name.startswith(typed)],
)
@wide
@as_json
def families(model_type: str | None, wide: bool, as_json: bool) -> None:
    """Show the model types that the tests cover, and what they have seen each type do.

    The tests make a small model of each type. They quantize it with its default settings and look at what comes out.
    "Loads with" is "stock" if transformers and peft alone load the folder, "loftq" if they need `import loftq` first,
    and "no" for a type that is refused. "Nearer" says whether the adapter brings the outputs nearer to those of the
    full-precision model, "trains" whether every factor of the adapter gets a gradient, or a part of them.
    "Calibrates" says what a calibrated start can use: text, text that reaches only a part of the linears ("partly"),
    or nothing. "In 16 bits" is the share of the weights that is not quantized, in a model of the size that the type
    has by default. In any other model type, every linear of its modules is quantized.
    """
    shown = [*coverage.types(), _OTHER] if model_type is None else [model_type]
    rows = [_row(name) for name in shown]
    if as_json:
        echo_json(rows)
    else:
        echo_table([{_TITLES.get(name, name): _cell(row[name]) for name in row} for row in rows], _FITTING, wide)


def _row(model_type: str) -> dict[str, Any]:
    """What is known of a model type. A check of several tasks passes if it passes for each of them."""
    family, seen = family_of(model_type), coverage.rows_of(model_type)
    refusals = [row["refused"] for row in seen if "refused" in row]
    passed = None if refusals or not seen else seen
    complete = all(row["trains"][0] == row["trains"][1] for row in passed or ())
    return {
        "model type": model_type,
        "tested": bool(seen),
        "loader": "no" if refusals else passed[0]["loads"] if passed else "as its modules need",
        "nearer": passed and all(row["nearer"] < 1 for row in passed),
        "trains": passed and ("yes" if complete else "partly"),
        "calibrates": passed and passed[0]["calibrates"],
        "kept": passed and passed[0]["kept"],
        "group": seen[0]["group"] if seen else None,
        "tasks": [row["task"] for row in seen] or ["the checkpoint's own"],
        "stays": list(family.stays),
        "targets": list(family.targets or (passed[0]["targets"] if passed else ["every linear"])),
        "refused": refusals[0] if refusals else None,
    }


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0%}"
    return ", ".join(value) if isinstance(value, list) else str(value)
