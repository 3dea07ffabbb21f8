"""`loftq merge`."""

from __future__ import annotations

from typing import Any

import click
from transformers.utils.logging import disable_progress_bar

from loftq.merging.settings import MergeRun, MergeSettings
from loftq.merging.targets import TARGETS
from loftq.verbs.merge import merge as run

from .options import Command, as_json, debug, given, option, options_of
from .output import show

_TARGETS = "\n".join(f"  {name:<18} {target.text}" for name, target in TARGETS.items())
_EPILOG = f"""\b
Targets:
{_TARGETS}

\b
Examples:
  loftq merge model_zoo/loftq/Llama-2-7b-hf-4bit-16rank --adapter trained --to bf16 --output merged
  loftq merge my-qalora-folder --adapter trained --to int --output deployed
"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("folder", metavar="DIR", type=click.Path())
@option(
    "--adapter",
    group="adapter",
    type=click.Path(),
    help="Folder of a trained adapter.  [default: the initial adapter of DIR]",
)
@option("--to", group="output", required=True, help=f"Kind of the merged model: {', '.join(TARGETS)}; see below.")
@option("--output", group="output", required=True, type=click.Path(), help="Folder to write.")
@options_of(MergeRun, MergeSettings, without=("output",))
@as_json
@debug
def merge(folder: str, as_json: bool, **options: Any) -> None:
    """Merge an adapter into the backbone that it was trained on.

    DIR is a folder that `loftq quantize` wrote, or a GPTQ checkpoint; for --to gguf it may also be a dense model. A
    trained adapter belongs to its backbone: on the original weights it would count the rounding error twice.
    """
    if options["quiet"]:
        disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' own, when it loads the models to compare
    show(run(folder, **given(options)), as_json)
