"""`loftq merge`."""

from __future__ import annotations

import json
from typing import Any

import click
from transformers.utils.logging import disable_progress_bar

from loftq.merging.targets import TARGETS
from loftq.verbs.merge import merge as run

_TARGETS = "\n".join(f"  {name:<9} {target.text}" for name, target in TARGETS.items())
_EPILOG = f"""\b
Targets:
{_TARGETS}

\b
Examples:
  loftq merge model_zoo/loftq/Llama-2-7b-hf-4bit-16rank --adapter trained --to bf16 --output merged
  loftq merge my-qalora-folder --adapter trained --to int --output deployed
"""


@click.command(epilog=_EPILOG)
@click.argument("folder", metavar="DIR", type=click.Path())
@click.option(
    "--adapter", type=click.Path(), help="The folder of a trained adapter.  [default: the initial one of DIR]"
)
@click.option("--to", required=True, help=f"{', '.join(TARGETS)}: see below.")
@click.option("--output", required=True, type=click.Path(), help="The folder to write.")
@click.option("--allow-rounding", is_flag=True, help="Write whole zero-points though they lose the adapter.")
@click.option("--no-check", is_flag=True, help="Do not compare logits before and after, for which models are loaded.")
@click.option("--max-shard-size", default="5GB", show_default=True)
@click.option("--resume", is_flag=True, help="Finish an interrupted run.")
@click.option("--overwrite", is_flag=True, help="Replace an existing loftq folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def merge(folder: str, as_json: bool, debug: bool, no_check: bool, **options: Any) -> None:
    """Merge an adapter into the backbone that it was trained on.

    DIR is a folder that `loftq quantize` wrote, or a GPTQ checkpoint. A trained adapter belongs to its backbone: on
    the original weights it would count the rounding error twice.
    """
    del debug  # read by main
    if options["quiet"]:
        disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' own, when it loads the models to compare
    report = run(folder, check=not no_check, **options)
    click.echo(json.dumps(report.to_dict()) if as_json else report.table())
