"""`loftq sweep`."""

from __future__ import annotations

import sys
from typing import Any

import click

import loftq
from loftq.planning.settings import QuantizeSettings, RunSettings
from loftq.settings import declared
from loftq.training.recipe_files import read_recipe
from loftq.training.sweep_settings import SweepSettings

from .options import Command, as_json, check_options, debug, given, option, options_of
from .output import show

_EPILOG = """\b
Examples:
  loftq sweep ./my-model --bits 2,3,4 --rank 8,16 --method qlora,loftq,calibrated --dry-run
  loftq sweep ./my-model --bits 2,3,4 --rank 8,16 --evaluate heldout.txt
  loftq sweep ./my-model --bits 4 --seeds 0,1,2 --train recipe.toml --evaluate heldout.txt
  loftq sweep --recipe sweep.toml
"""
_VARIED = ("bits", "rank", "method", "seed")
_LEFT_OUT = (*_VARIED, "backbone")  # of a given backbone nothing is quantized
_RUN = ("revision", "trust_remote_code", "token", "device", "workers", "quiet")


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("model", required=False, type=click.Path())
@option("--recipe", group="model", metavar="FILE", help="File of settings (.toml, .yaml, .json); options override it.")
@options_of(SweepSettings)
@options_of(QuantizeSettings, without=_LEFT_OUT)
@options_of(RunSettings, only=_RUN)
@as_json
@debug
def sweep(model: str | None, recipe: str | None, as_json: bool, **options: Any) -> None:
    """Quantize MODEL with each combination of --bits, --rank, --method and --seeds, and compare the results.

    With --train each cell is trained by a recipe of `loftq train`, with --evaluate its perplexity is measured. The
    folder holds a folder for each cell, sweep.json, sweep.csv, and report.html (with `pip install loftq[report]`). The
    statistics of the calibration text are gathered once. A cell that fails is recorded and the others go on; the exit
    code is then 1. Run the same command again to continue an interrupted sweep, and to make failed cells again; more
    values add cells.
    """
    settings: dict[str, Any] = given(options)
    check_options(settings, QuantizeSettings, RunSettings, SweepSettings)
    if recipe is not None:
        own = {*declared(QuantizeSettings), *declared(RunSettings), *declared(SweepSettings)}
        settings = {**read_recipe(recipe, *([] if model is None else [model]), own=own), **settings}
        model = settings.pop("model", None)
    result = loftq.sweep(model, **settings)
    show(result, as_json)
    if result.failed:
        sys.exit(1)
