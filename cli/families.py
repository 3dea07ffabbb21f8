"""`loftq families`."""

from __future__ import annotations

import click

from loftq.models.families import FAMILIES, Family, family_of

from .options import Command, as_json, names_of, wide
from .output import echo_json, echo_table

_EPILOG = """\b
Examples:
  loftq families
  loftq families bert
  loftq families --wide | less -S
  loftq families --json | jq '.[] | select(.loader == "loftq")'
"""
_TITLES = {"loader": "loads with"}
_FITTING = ("model type", "loads with", "targets", "tasks")


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("model_type", required=False, shell_complete=names_of(FAMILIES))
@wide
@as_json
def families(model_type: str | None, wide: bool, as_json: bool) -> None:
    """Show the known model types, and the modules that are quantized in them.

    "Loads with" is "stock" if transformers and peft alone load the folder, and "loftq" if they need `import loftq`
    first. "Stays" lists modules that are not quantized, in addition to embeddings, norms and heads. In a model type
    without a row, every linear of its modules is quantized.
    """
    shown = [*FAMILIES.values(), family_of("any other")] if model_type is None else [family_of(model_type)]
    rows = [_row(family) for family in shown]
    if as_json:
        echo_json(rows)
    else:
        echo_table([{_TITLES.get(name, name): _cell(row[name]) for name in row} for row in rows], _FITTING, wide)


def _row(family: Family) -> dict[str, object]:
    return {
        "model type": family.model_type,
        "tested": family.tested,
        "loader": ("stock" if family.stock else "loftq") if family.tested else "as its modules need",
        "stays": list(family.stays),
        "targets": list(family.targets or ("every linear",)),
        "tasks": list(family.tasks or ("the checkpoint's own",)),
    }


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "tested" if value else "generic"
    return ", ".join(value) if isinstance(value, list) else str(value)
