"""`loftq push`."""

from __future__ import annotations

import json
from typing import Any

import click
from huggingface_hub.utils.tqdm import disable_progress_bars

from loftq.verbs.push import push as run

_EPILOG = """\b
Examples:
  loftq push model_zoo/loftq/Llama-2-7b-hf-4bit-16rank me/Llama-2-7b-loftq --private
  loftq push my-folder me/my-model --tag v1 --dry-run
  loftq push my-folder me/my-model --adapter trained --subfolder gsm8k
"""


@click.command(epilog=_EPILOG)
@click.argument("folder", metavar="DIR")
@click.argument("repo_id", metavar="REPO_ID")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", help="A branch, made where it is new.  [default: main]")
@click.option("--tag", help="Tag the commit.")
@click.option("--create-pr", is_flag=True, help="Open a pull request, in a repository of somebody else's too.")
@click.option("--adapter", metavar="TRAINED", help="The folder of an adapter trained on DIR, to be pushed with it.")
@click.option("--subfolder", metavar="NAME", help="Where it goes.  [default: its folder's name]")
@click.option("--overwrite", is_flag=True, help="Replace another loftq model in the repository.")
@click.option("--token", help="Hub token; better: `hf auth login`.")
@click.option("--dry-run", is_flag=True, help="Check everything; nothing is sent.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def push(folder: str, repo_id: str, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Upload DIR, which `loftq quantize` wrote, to REPO_ID (USER/NAME) on the Hub, and print what loads it by its id.

    Files that loftq.json does not list stay here, and DIR stays as it is. A push that broke off goes on where it was:
    run the same line again. A commit appears when all has arrived, so nobody loads a part.
    """
    del debug  # read by main
    if quiet:
        disable_progress_bars()
    report = run(folder, repo_id, **options)
    click.echo(json.dumps(report.to_dict()) if as_json else f"{report.table()}\n\n{report.lines}", nl=as_json)
