"""`loftq zoo`."""

from __future__ import annotations

from typing import Any

import click
from huggingface_hub.utils.tqdm import disable_progress_bars

from loftq.display import size, visible
from loftq.planning.command_line import command_line
from loftq.planning.settings import QuantizeSettings, RunSettings
from loftq.settings import declared
from loftq.verbs import zoo as recipes

from .options import Command, as_json, debug, given, options_of
from .output import echo, echo_json, show_report

_COLUMNS = {"name": "recipe", "model": "model", "bits": "bits", "rank": "rank"}
_SIZES = {"disk": "on disk", "load": "to load", "train": "to train"}
_CALIBRATION = ("calibration", "calibration_tokens", "sequence_length", "refine")  # settings that go with any recipe
_RUN = tuple(name for name in declared(RunSettings) if name != "revision")
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
        echo(recipes.markdown(), nl=False)
        return
    rows = recipes.table()
    if as_json:
        echo_json(rows)
        return
    lines = [{**_COLUMNS, **_SIZES}]
    lines += [{**{key: str(row[key]) for key in _COLUMNS}, **{key: size(row[key]) for key in _SIZES}} for row in rows]
    widths = {key: max(len(line[key]) for line in lines) for key in lines[0]}
    echo("\n".join("  ".join(line[key].ljust(widths[key]) for key in line).rstrip() for line in lines))


@zoo.command()
@click.argument("name")
def show(name: str) -> None:
    """Show a recipe: its file, the command it stands for, and what it will take."""
    entry = recipes.find_recipe(name)
    rows = [
        ("command", command_line(entry.recipe, entry.plan.source).replace(" \\\n ", "")),
        ("layers", f"{len(entry.plan.layers)} linears, {entry.plan.weights / 1e6:,.1f} M weights"),
        ("bits per weight", f"{entry.plan.layer_bits:.3f}"),
        *((title, size(getattr(entry.footprint, key))) for key, title in _SIZES.items() if key != "train"),
        (_SIZES["train"], f"{size(entry.footprint.train)} with {recipes.TRAINED_WITH}"),
        ("", "`loftq train --dry-run` shows what your data and options need"),
        *(("note", note) for note in entry.plan.notes),
    ]
    width = max(len(title) for title, _ in rows)
    echo(entry.text + "\n" + "\n".join(f"{title:<{width}}  {visible(value)}" for title, value in rows))


@zoo.command(cls=Command, epilog=_EPILOG)
@click.argument("name")
@options_of(QuantizeSettings, RunSettings, only=(*_CALIBRATION, *_RUN))
@as_json
@debug
def build(name: str, as_json: bool, **options: Any) -> None:
    """Quantize the model of a recipe with its settings."""
    if options["quiet"]:
        disable_progress_bars()  # the Hub client's own
    show_report(recipes.build_recipe(name, **given(options)), as_json)
