"""`loftq generate`."""

from __future__ import annotations

import sys
from typing import Any

import click

from loftq.training.generate import generate as run
from loftq.training.generate import read_prompt

from .options import cpu, dtype

_EPILOG = """\b
Examples:
  loftq generate MODEL_DIR --prompt "Why is the sky blue?"
  loftq generate MODEL_DIR --adapter trained --prompt - < question.txt
  loftq generate MODEL_DIR --prompt "Once upon a time" --no-chat-template --temperature 0.8
"""


@click.command(epilog=_EPILOG)
@click.argument("model", metavar="DIR")
@click.option("--prompt", required=True, help="What to say to it; `-` reads it from the standard input.")
@click.option("--adapter", help="The folder of a trained adapter.  [default: the initial one of DIR]")
@click.option("--system", help="What the chat template puts before.")
@click.option("--chat-template/--no-chat-template", default=None, help="[default: if the model has one]")
@click.option("--max-new-tokens", type=int, default=256, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0: the likeliest token always.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@dtype
@cpu
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def generate(model: str, prompt: str, debug: bool, **options: Any) -> None:
    """Write what DIR, a folder that `loftq quantize` wrote, or any model, says to a prompt, as it comes."""
    del debug  # read by main
    run(model, read_prompt(prompt), stream=sys.stdout, **options)
