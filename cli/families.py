"""`loftq families`."""

from __future__ import annotations

import json

import click

from loftq.models.families import FAMILIES, Family, family_of

_EPILOG = """\b
Examples:
  loftq families
  loftq families bert
  loftq families --json | jq '.[] | select(.loader == "loftq")'
"""


@click.command(epilog=_EPILOG)
@click.argument("model_type", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def families(model_type: str | None, as_json: bool) -> None:
    """Show which model types are known, and what is quantized in them.

    "Loads with" says whether stock transformers and peft load the folder, or need `import loftq` before. "Stays" is
    what is not quantized beside embeddings, norms and heads. A type without a row is quantized the generic way: every
    linear of its modules.
    """
    known = [*FAMILIES.values(), family_of("any other")] if model_type is None else [family_of(model_type)]
    rows = [_row(family) for family in known]
    click.echo(json.dumps(rows) if as_json else _table([{name: _cell(row[name]) for name in row} for row in rows]))


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


def _table(rows: list[dict[str, str]]) -> str:
    lines = [{name: "loads with" if name == "loader" else name for name in rows[0]}, *rows]
    order = ["model type", "tested", "loader", "stays", "targets", "tasks"]
    widths = {name: max(len(line[name]) for line in lines) for name in order}
    return "\n".join("  ".join(line[name].ljust(widths[name]) for name in order).rstrip() for line in lines)
