"""`loftq generate`."""

from __future__ import annotations

from typing import Any

import click

import loftq
from loftq.training.sampling import Sampling
from loftq.training.settings import TrainSettings

from .options import Command, as_json, debug, given, option, options_of
from .output import echo_json, model_stream

_EPILOG = """\b
Examples:
  loftq generate MODEL_DIR --prompt "Why is the sky blue?"
  loftq generate MODEL_DIR --adapter trained --prompt - < question.txt
  loftq generate MODEL_DIR --image cat.png --prompt "What is this?"
  loftq generate MODEL_DIR --prompt "Once upon a time" --no-chat-template --temperature 0.8
"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("model", metavar="DIR|REPO_ID", type=click.Path())
@option("--prompt", group="data", required=True, help="Text to begin with; `-` reads it from the standard input.")
@option("--image", "images", group="data", multiple=True, help="Image before the prompt, for models that read images.")
@option("--system", group="data", help="System message, for models with a chat template.")
@option(
    "--chat-template/--no-chat-template",
    group="data",
    default=None,
    help="Write the prompt with the model's chat template.  [default: if the model has one]",
)
@option("--adapter", group="adapter", help="Folder or id on the Hub of a trained adapter.  [default: that of DIR]")
@options_of(Sampling)
@options_of(TrainSettings, only=("dtype", "cpu", "offload"))
@as_json
@debug
def generate(model: str, prompt: str, as_json: bool, **options: Any) -> None:
    """Write text with a model and show it as it comes.

    DIR is a folder that `loftq quantize` wrote, or any model. With --json the prompt, the answer and the given options
    are printed when the answer is complete.
    """
    from loftq.training.generate import read_prompt  # imports transformers, which takes seconds

    text, settings = read_prompt(prompt), given(options)
    if not as_json:
        loftq.generate(model, text, stream=model_stream(), **settings)
        return
    answer = loftq.generate(model, text, **settings)
    echo_json({"model": model, "prompt": text, "answer": answer, "options": settings})
