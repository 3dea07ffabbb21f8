"""`loftq push`."""

from __future__ import annotations

from typing import Any

import click

import loftq

from .options import Command, as_json, debug, option, quiet, token
from .output import echo, quiet_hub, show

_EPILOG = """\b
Examples:
  loftq push model_zoo/loftq/Llama-2-7b-hf-4bit-16rank me/Llama-2-7b-loftq --private
  loftq push my-folder me/my-model --tag v1 --dry-run
  loftq push my-folder me/my-model --adapter trained --subfolder gsm8k
"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("folder", metavar="DIR", type=click.Path())
@click.argument("repo_id", metavar="REPO_ID")
@option("--private", group="hub", is_flag=True, help="Make a new repository private.")
@option("--revision", group="hub", help="Branch to push to; it is made if it does not exist.  [default: main]")
@option("--tag", group="hub", help="Tag for the commit.")
@option("--create-pr", group="hub", is_flag=True, help="Open a pull request, also in a repository of somebody else.")
@option("--overwrite", group="hub", is_flag=True, help="Replace another loftq model in the repository.")
@token
@option(
    "--adapter",
    group="adapter",
    metavar="TRAINED",
    type=click.Path(),
    help="Folder of an adapter trained on DIR, to be pushed with it.",
)
@option(
    "--subfolder",
    group="adapter",
    metavar="NAME",
    help="Folder of the adapter in the repository.  [default: the name of its folder here]",
)
@option("--dry-run", is_flag=True, help="Check everything; nothing is sent.")
@quiet
@as_json
@debug
def push(folder: str, repo_id: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Upload DIR, which `loftq quantize` or `loftq merge` wrote, to REPO_ID (USER/NAME) on the Hub, and print the
    lines that load or serve it.

    Only the files that loftq.json lists are sent, and DIR stays as it is. If a push is interrupted, run the same
    command again to continue. The commit appears when everything has arrived, so nobody loads a part of a model.
    """
    if quiet:
        quiet_hub()
    report = loftq.push(folder, repo_id, **options)
    show(report, as_json)
    if not as_json:
        echo(f"\n{report.lines}", nl=False)
