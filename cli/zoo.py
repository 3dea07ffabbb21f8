"""`loftq zoo`."""

from __future__ import annotations

from typing import Any

import click

from loftq.display import size, visible
from loftq.planning.settings import QuantizeSettings, RunSettings
from loftq.settings import declared
from loftq.verbs import zoo as recipes

from .options import Command, as_json, check_options, debug, given, names_of, option, options_of, wide
from .output import Context, echo, echo_json, echo_table, quiet_hub, show_report

_COLUMNS = {"name": "recipe", "model": "model", "bits": "bits", "rank": "rank"}
_SIZES = {"disk": "on disk", "load": "to load", "train": "to train"}
_CALIBRATION = ("calibration", "calibration_tokens", "sequence_length", "refine")  # settings that go with any recipe
_RUN = tuple(name for name in declared(RunSettings) if name not in ("revision", "source"))
_completed = names_of(recipes.recipe_names())
_EPILOG = """\b
Examples:
  loftq zoo list
  loftq zoo show llama-2-7b
  loftq zoo build qwen3-8b --calibration default
"""


class _Group(click.Group):
    """The group of these commands."""

    context_class = Context


@click.group(cls=_Group, epilog=_EPILOG)
def zoo() -> None:
    """Recipes for known models, to be built by name."""


@zoo.command("list", cls=Command)
@option("--markdown", is_flag=True, help="Print model_zoo/README.md, computed again.")
@option("--sizes", is_flag=True, help="Print model_zoo/sizes.json, computed again.")
@wide
@as_json
def list_(markdown: bool, sizes: bool, wide: bool, as_json: bool) -> None:
    """List the recipes with what they take on disk, loaded, and in training. As JSON, sizes are in bytes."""
    if markdown or sizes:
        echo(recipes.sizes() if sizes else recipes.markdown(), nl=False)
        return
    rows = recipes.listed()
    if as_json:
        echo_json(rows)
        return
    cells = [
        {title: str(row[key]) for key, title in _COLUMNS.items()}
        | {title: size(row[key]) for key, title in _SIZES.items()}
        for row in rows
    ]
    echo_table(cells, ("recipe", "bits", "rank", *_SIZES.values()), wide)


@zoo.command(cls=Command)
@click.argument("name", shell_complete=_completed)
def show(name: str) -> None:
    """Show a recipe: its file, the command it stands for, and what it will take."""
    from loftq.planning.command_line import command_line  # torch takes a second

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
@click.argument("name", shell_complete=_completed)
@options_of(QuantizeSettings, RunSettings, only=(*_CALIBRATION, *_RUN))
@as_json
@debug
def build(name: str, as_json: bool, **options: Any) -> None:
    """Quantize the model of a recipe with its settings."""
    settings = given(options)
    check_options(settings, QuantizeSettings, RunSettings)
    if options["quiet"]:
        quiet_hub()
    show_report(recipes.build_recipe(name, **settings), as_json)
