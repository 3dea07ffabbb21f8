"""`loftq generate`."""

from __future__ import annotations

from typing import Any

import click

import loftq
from loftq.training.settings import TrainSettings

from .options import Command, debug, option, options_of
from .output import model_stream

_EPILOG = """\b
Examples:
  loftq generate MODEL_DIR --prompt "Why is the sky blue?"
  loftq generate MODEL_DIR --adapter trained --prompt - < question.txt
  loftq generate MODEL_DIR --prompt "Once upon a time" --no-chat-template --temperature 0.8
"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("model", metavar="DIR", type=click.Path())
@option("--prompt", group="data", required=True, help="Text to begin with; `-` reads it from the standard input.")
@option("--system", group="data", help="System message, for models with a chat template.")
@option(
    "--chat-template/--no-chat-template",
    group="data",
    default=None,
    help="Write the prompt with the model's chat template.  [default: if the model has one]",
)
@option("--adapter", group="adapter", help="Folder of a trained adapter.  [default: the initial adapter of DIR]")
@option("--max-new-tokens", type=int, default=256, show_default=True, help="Largest number of tokens to write.")
@option(
    "--temperature", type=float, default=0.0, show_default=True, help="Temperature of sampling; 0 takes the likeliest."
)
@option("--top-p", type=float, default=1.0, show_default=True, help="Part of the probability that sampling draws from.")
@option("--seed", type=int, default=0, show_default=True, help="Seed of the sampling.")
@options_of(TrainSettings, only=("dtype", "cpu", "offload"))
@debug
def generate(model: str, prompt: str, **options: Any) -> None:
    """Write text with a model and show it as it comes.

    DIR is a folder that `loftq quantize` wrote, or any model.
    """
    from loftq.training.generate import read_prompt  # imports transformers, which takes seconds

    loftq.generate(model, read_prompt(prompt), stream=model_stream(), **options)
