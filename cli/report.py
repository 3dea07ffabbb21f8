"""`loftq report`."""

from __future__ import annotations

import click

from loftq.verbs.report import report as run

_EPILOG = """\b
Examples:
  loftq report model_zoo/loftq/Llama-2-7b-hf-4bit-16rank --html report.html
  loftq report nf4-qlora nf4-loftq nf4-calibrated --html report.html --png report.png
"""


@click.command(epilog=_EPILOG)
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=click.Path())
@click.option("--html", type=click.Path(), help="The page to write: one file that needs no network.")
@click.option("--png", type=click.Path(), help="The picture to write.")
@click.option("--overwrite", is_flag=True, help="Replace files that are there already.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def report(folders: tuple[str, ...], html: str | None, png: str | None, overwrite: bool, debug: bool) -> None:
    """Compare folders that loftq wrote, side by side.

    Errors by layer and kind of module, what iterations did, bits by layer, what the adapters' singular values hold. Of
    each folder only loftq.json and the adapter are read. Errors of outputs are shown of what was made with
    --calibration, whatever its method. Needs `pip install loftq[report]`.
    """
    del debug  # read by main
    for path in run(folders, html=html, png=png, overwrite=overwrite):
        click.echo(path)
