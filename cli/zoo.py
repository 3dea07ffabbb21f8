"""`loftq zoo`."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click
from huggingface_hub.utils.tqdm import disable_progress_bars

from loftq.display import size
from loftq.planning.command_line import command_line
from loftq.planning.recipe import Recipe
from loftq.verbs import zoo as recipes

from .output import show as show_report
from .quantize import quantize

_COLUMNS = {"name": "recipe", "model": "model", "bits": "bits", "rank": "rank"}
_SIZES = {"disk": "on disk", "load": "to load", "train": "to train"}
_CALIBRATION = {"calibration", "calibration_tokens", "sequence_length", "refine"}  # settings that go with any recipe
_FIXED = {"model", "model_name_or_path", "revision"} | {
    field.name for field in dataclasses.fields(Recipe)
} - _CALIBRATION
_EPILOG = """\b
Examples:
  loftq zoo list
  loftq zoo show llama-2-7b
  loftq zoo build qwen3-8b --calibration default
"""


@click.group(epilog=_EPILOG)
def zoo() -> None:
    """Recipes for known models, to be built by name."""


@zoo.command("list")
@click.option("--markdown", is_flag=True, help="Print model_zoo/README.md.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON, sizes in bytes.")
def list_(markdown: bool, as_json: bool) -> None:
    """List the recipes with what they take on disk, loaded, and in training."""
    if markdown:
        click.echo(recipes.markdown(), nl=False)
        return
    rows = recipes.table()
    if as_json:
        click.echo(json.dumps(rows))
        return
    lines = [{**_COLUMNS, **_SIZES}]
    lines += [{**{key: str(row[key]) for key in _COLUMNS}, **{key: size(row[key]) for key in _SIZES}} for row in rows]
    widths = {key: max(len(line[key]) for line in lines) for key in lines[0]}
    click.echo("\n".join("  ".join(line[key].ljust(widths[key]) for key in line).rstrip() for line in lines))


@zoo.command()
@click.argument("name")
def show(name: str) -> None:
    """Show a recipe: its file, the command it stands for, and what it will take."""
    entry = recipes.find_recipe(name)
    rows = [
        ("command", command_line(entry.recipe, entry.plan.source).replace(" \\\n ", "")),
        ("layers", f"{len(entry.plan.layers)} linears, {entry.plan.weights / 1e6:,.1f} M weights"),
        ("bits per weight", f"{entry.plan.layer_bits:.3f}"),
        *((title, size(getattr(entry.footprint, key))) for key, title in _SIZES.items()),
        *(("note", note) for note in entry.plan.notes),
    ]
    width = max(len(title) for title, _ in rows)
    click.echo(entry.text + "\n" + "\n".join(f"{title:<{width}}  {value}" for title, value in rows))


@zoo.command(epilog=_EPILOG, params=[click.Argument(["name"]), *(p for p in quantize.params if p.name not in _FIXED)])
def build(name: str, as_json: bool, debug: bool, **options: Any) -> None:
    """Quantize the model of a recipe with its settings."""
    del debug  # read by main
    if options["quiet"]:
        disable_progress_bars()  # the Hub client's own
    given = {key: value for key, value in options.items() if key not in _CALIBRATION or value is not None}
    show_report(recipes.build(name, **given), as_json)
