"""`loftq merge`."""

from __future__ import annotations

from typing import Any

import click

import loftq
from loftq.errors import UnknownNameError
from loftq.merging.settings import MergeRun, MergeSettings
from loftq.merging.targets import ROWS

from .options import Command, as_json, check_options, debug, given, names_of, option, options_of
from .output import show

_OWN = ("adapter", "to")  # options that no settings class declares
_TARGETS = "\n".join(f"  {name:<18} {target.text}" for name, target in ROWS.items())
_EPILOG = f"""\b
Targets:
{_TARGETS}

\b
Examples:
  loftq merge model_zoo/loftq/Llama-2-7b-hf-4bit-16rank --adapter trained --to bf16 --output merged
  loftq merge my-qalora-folder --adapter trained --to int --output deployed
"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("folder", metavar="DIR|REPO_ID", type=click.Path())
@option(
    "--adapter",
    group="adapter",
    type=click.Path(),
    help="Folder or id on the Hub of a trained adapter.  [default: that of DIR]",
)
@option(
    "--to",
    group="output",
    required=True,
    shell_complete=names_of(ROWS),
    help=f"Kind of the merged model: {', '.join(ROWS)}; see below.",
)
@option("--output", group="output", required=True, type=click.Path(), help="Folder to write.")
@options_of(MergeRun, MergeSettings, without=("output",))
@as_json
@debug
def merge(folder: str, as_json: bool, **options: Any) -> None:
    """Merge an adapter into the backbone that it was trained on.

    DIR is a folder that `loftq quantize` wrote, or a GPTQ checkpoint; for --to gguf it may also be a dense model. A
    trained adapter belongs to its backbone: on the original weights it would count the rounding error twice.
    """
    settings = given(options)
    check_options({name: value for name, value in settings.items() if name not in _OWN}, MergeRun, MergeSettings)
    if settings["to"] not in ROWS:
        raise UnknownNameError("target", settings["to"], ROWS)
    show(loftq.merge(folder, **settings), as_json)
