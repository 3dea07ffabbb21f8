"""`loftq inspect`."""

from __future__ import annotations

from typing import Any

import click

import loftq

from .options import Command, as_json, debug, option, token
from .output import quiet_hub, show

_EPILOG = """\b
Examples:
  loftq inspect model_zoo/loftq/Llama-2-7b-hf-4bit-16rank
  loftq inspect user/Llama-2-7b-hf-4bit-16rank --json | jq .bits_per_weight
  loftq inspect ./trained
"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("folder", metavar="DIR|REPO_ID", type=click.Path())
@option(
    "--worst", type=int, default=5, show_default=True, help="Number of layers to show, those with the largest error."
)
@option("--revision", group="hub", help="Branch, tag or commit on the Hub.")
@token
@as_json
@debug
def inspect(folder: str, as_json: bool, **options: Any) -> None:
    """Show what is in a folder or repository that loftq wrote, or in a trained adapter.

    It shows the type, bits per weight, rank, targets, sizes, errors, worst layers and settings. Only headers are read;
    no weights of a repository are downloaded.
    """
    quiet_hub()  # what is fetched is small
    show(loftq.inspect(folder, **options), as_json)
