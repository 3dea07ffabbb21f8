"""`loftq verify`."""

from __future__ import annotations

import sys
from typing import Any

import click

import loftq

from .options import Command, as_json, debug, option, quiet, token, trust_remote_code
from .output import quiet_hub, show

_EPILOG = """\b
Examples:
  loftq verify model_zoo/loftq/Llama-2-7b-hf-4bit-16rank
  loftq verify model_zoo/loftq/Llama-2-7b-hf-4bit-16rank --source meta-llama/Llama-2-7b-hf
"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("folder", metavar="DIR|REPO_ID", type=click.Path())
@option(
    "--source",
    group="model",
    metavar="MODEL",
    type=click.Path(),
    help="The model from which DIR was made: the error of every layer is computed again.",
)
@option("--revision", group="model", help="Revision of MODEL on the Hub.  [default: the one that loftq.json names]")
@trust_remote_code
@token
@quiet
@as_json
@debug
def verify(folder: str, as_json: bool, **options: Any) -> None:
    """Compare a folder that loftq wrote with its loftq.json: hashes, names, dtypes, shapes, completeness.

    With --source, the layers are read as loaders of the folder read them, and their errors are compared with those
    that were reported. Each file, tensor or layer that differs is named, and the exit code is then 1. The card,
    README.md, may be edited.
    """
    if options["quiet"]:
        quiet_hub()
    result = loftq.verify(folder, **options)
    show(result, as_json)
    if not result.sound:
        sys.exit(1)
