"""`loftq report`."""

from __future__ import annotations

import click

import loftq

from .options import Command, debug, option
from .output import echo

_EPILOG = """\b
Examples:
  loftq report model_zoo/loftq/Llama-2-7b-hf-4bit-16rank --html report.html
  loftq report nf4-qlora nf4-loftq nf4-calibrated --html report.html --png report.png
"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=click.Path())
@option("--html", group="output", type=click.Path(), help="Page to write: one file that needs no network.")
@option("--png", group="output", type=click.Path(), help="Picture to write.")
@option("--overwrite", group="output", is_flag=True, help="Replace files that exist already.")
@debug
def report(folders: tuple[str, ...], html: str | None, png: str | None, overwrite: bool) -> None:
    """Compare folders that loftq wrote, side by side.

    The page shows the errors by layer and by kind of module, what each iteration changed, the bits of each layer, and
    the singular values of the adapters. Only loftq.json and the adapter of each folder are read. Output errors are
    shown for folders that were made with --calibration. Needs `pip install loftq[report]`.
    """
    for path in loftq.report(folders, html=html, png=png, overwrite=overwrite):
        echo(str(path))
