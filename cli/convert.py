"""`loftq convert`."""

from __future__ import annotations

from typing import Any

import click

import loftq

from .options import Command, as_json, debug, option, overwrite
from .output import show

_EPILOG = """\b
Examples:
  loftq convert my-model --format bitsandbytes-fsdp --output my-model-fsdp
  loftq convert my-model-fsdp --format bitsandbytes --output my-model
"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("folder", metavar="DIR", type=click.Path())
@option("--format", group="quantization", required=True, help="Format to write: bitsandbytes or bitsandbytes-fsdp.")
@option("--output", group="output", required=True, metavar="DIR", type=click.Path(), help="Folder to write.")
@overwrite
@as_json
@debug
def convert(folder: str, as_json: bool, **options: Any) -> None:
    """Write DIR in another format that has the same codes, without solving again.

    DIR is a folder that `loftq quantize` wrote. FSDP splits the codes of bitsandbytes-fsdp, and servers read those of
    bitsandbytes. The adapter is copied, and an adapter that was trained on DIR fits the new folder.
    """
    show(loftq.convert(folder, **options), as_json)
