"""`loftq report`."""

from __future__ import annotations

import click

import loftq
from loftq.display import visible

from .options import Command, as_json, debug, option
from .output import echo, echo_json

_EPILOG = """\b
Examples:
  loftq report model_zoo/loftq/Llama-2-7b-hf-4bit-16rank --html report.html
  loftq report nf4-qlora nf4-loftq nf4-calibrated --html report.html --png report.png
  loftq report my-model-sweep --csv > report.csv
"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=click.Path())
@option("--html", group="output", type=click.Path(), help="Page to write: one file that needs no network.")
@option("--png", group="output", type=click.Path(), help="Picture to write.")
@option("--csv", "as_csv", group="output", is_flag=True, help="Print the figures with commas, a row for each folder.")
@as_json
@option("--overwrite", group="output", is_flag=True, help="Replace files that exist already.")
@debug
def report(
    folders: tuple[str, ...], html: str | None, png: str | None, as_csv: bool, as_json: bool, overwrite: bool
) -> None:
    """Compare folders that loftq wrote, side by side. The folder of a sweep stands for its complete cells.

    The page shows errors by layer and by kind of module, what each iteration changed, the bits of each layer, and
    the singular values of the adapters. Only loftq.json and the adapter of each folder are read. Output errors are
    shown for folders that were made with --calibration. Needs `pip install loftq[report]`.
    """
    if as_csv and as_json:
        raise click.UsageError("--csv and --json exclude each other: name one of them")
    printed = as_csv or as_json
    if not printed or html is not None or png is not None:
        for path in loftq.report(folders, html=html, png=png, overwrite=overwrite):
            click.echo(visible(str(path)), err=printed)
    if not printed:
        return
    from loftq.verbs.report import report_figures  # imports torch, which takes seconds

    if as_csv:
        echo(report_figures(folders).csv(), nl=False)
    else:
        echo_json(report_figures(folders).to_dict())
