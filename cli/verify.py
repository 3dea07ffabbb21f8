"""`loftq verify`."""

from __future__ import annotations

import json
import sys
from typing import Any

import click
from huggingface_hub.utils.tqdm import disable_progress_bars

from loftq.verbs.verify import verify as run

_EPILOG = """\b
Examples:
  loftq verify model_zoo/loftq/Llama-2-7b-hf-4bit-16rank
  loftq verify model_zoo/loftq/Llama-2-7b-hf-4bit-16rank --source meta-llama/Llama-2-7b-hf
"""


@click.command(epilog=_EPILOG)
@click.argument("folder", metavar="DIR", type=click.Path())
@click.option(
    "--source", metavar="MODEL", type=click.Path(), help="The model it was made of: compute every layer's error again."
)
@click.option("--revision", help="Of MODEL on the Hub.  [default: the one that loftq.json names]")
@click.option("--token", help="Hub token; better: `hf auth login`.")
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code that the model brings.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def verify(folder: str, as_json: bool, debug: bool, **options: Any) -> None:
    """Compare a folder that loftq wrote with its loftq.json: hashes, names, dtypes, shapes, completeness.

    With --source, the layers are read as those who load the folder read them, and their errors must be the ones that
    were reported. What differs is named, file, tensor or layer, and the exit code is then 1. The card, README.md, may
    have been edited.
    """
    del debug  # read by main
    if options["quiet"]:
        disable_progress_bars()  # the Hub client's own
    found = run(folder, **options)
    click.echo(json.dumps(found.to_dict()) if as_json else found.table())
    if not found.sound:
        sys.exit(1)
