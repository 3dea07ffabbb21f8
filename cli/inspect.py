"""`loftq inspect`."""

from __future__ import annotations

import json
from typing import Any

import click
from huggingface_hub.utils.tqdm import disable_progress_bars

from loftq.verbs.inspect import inspect as run

_EPILOG = """\b
Examples:
  loftq inspect model_zoo/loftq/Llama-2-7b-hf-4bit-16rank
  loftq inspect user/Llama-2-7b-hf-4bit-16rank --json | jq .bits_per_weight
  loftq inspect ./trained
"""


@click.command(epilog=_EPILOG)
@click.argument("folder", metavar="DIR|REPO_ID", type=click.Path())
@click.option("--worst", type=int, default=5, show_default=True, help="How many of the layers with the largest error.")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--token", help="Hub token; better: `hf auth login`.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def inspect(folder: str, as_json: bool, debug: bool, **options: Any) -> None:
    """Show what is in a folder or repository that loftq wrote, or in a trained adapter.

    Type, bits per weight, rank, targets, sizes, errors, worst layers, settings: from headers alone. Of a repository no
    weights are downloaded.
    """
    del debug  # read by main
    disable_progress_bars()  # the Hub client's own: what is fetched is small
    found = run(folder, **options)
    click.echo(json.dumps(found.to_dict()) if as_json else found.table())
