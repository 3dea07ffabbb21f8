"""`loftq relocate`."""

from __future__ import annotations

from typing import Any

import click

import loftq

from .options import Command, as_json, debug, option
from .output import show

_EPILOG = """\b
Examples:
  loftq relocate /new/place/my-model
  loftq relocate trained --backbone /new/place/my-model
"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("folder", metavar="DIR|TRAINED", type=click.Path())
@option(
    "--backbone",
    group="model",
    metavar="DIR",
    type=click.Path(),
    help="Folder of the backbone of TRAINED.  [default: where the adapter finds it]",
)
@as_json
@debug
def relocate(folder: str, as_json: bool, **options: Any) -> None:
    """Let an adapter name the present place of its backbone, after folders were moved, copied or downloaded.

    loftq itself finds a folder that was moved. Other programs that open only the adapter (`DIR/loftq_init`, or TRAINED)
    read the place of the backbone from its configuration.
    """
    show(loftq.relocate(folder, **options), as_json)
