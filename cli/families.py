"""`loftq families`."""

from __future__ import annotations

import click

from loftq.display import columns
from loftq.models.families import FAMILIES, Family, family_of

from .options import Command, as_json
from .output import echo, echo_json

_EPILOG = """\b
Examples:
  loftq families
  loftq families bert
  loftq families --json | jq '.[] | select(.loader == "loftq")'
"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("model_type", required=False)
@as_json
def families(model_type: str | None, as_json: bool) -> None:
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
        echo(_table(rows))


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


def _table(rows: list[dict[str, object]]) -> str:
    titles = {"model type": "model type", "tested": "tested", "loader": "loads with"}
    titles |= {name: name for name in ("stays", "targets", "tasks")}
    return columns([list(titles.values()), *([_cell(row[name]) for name in titles] for row in rows)])
