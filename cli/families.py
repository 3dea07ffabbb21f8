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
_FITTING = {"model type": "model type", "loader": "loads with", "targets": "targets", "tasks": "tasks"}
_ALL = {**_FITTING, "stays": "stays", "tested": "tested"}


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
        titles = _ALL if wide else _FITTING
        cells = [[_cell(row[name]) for name in titles] for row in rows]
        echo_table([list(titles.values()), *cells], wide)


def _row(family: Family) -> dict[str, object]:
    return {
        "model type": family.model_type,
        "tasks": list(family.tasks or ("the checkpoint's own",)),
        "targets": list(family.targets or ("every linear",)),
        "stays": list(family.stays),
        "loader": ("stock" if family.stock else "loftq") if family.tested else "as its modules need",
        "tested": family.tested,
    }


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "tested" if value else "generic"
    return ", ".join(value) if isinstance(value, list) else str(value)
