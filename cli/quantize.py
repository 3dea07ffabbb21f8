"""`loftq quantize`."""

from __future__ import annotations

from typing import Any

import click

import loftq
from loftq.planning.settings import QuantizeSettings, RunSettings

from .options import Command, as_json, check_options, debug, given, option, options_of
from .output import quiet_hub, show_report

_EPILOG = """\b
Examples:
  loftq quantize meta-llama/Llama-2-7b-hf --bits 4 --rank 16 --iter 5
  loftq quantize ./my-model --target-modules q_proj,v_proj --rank 64 --alpha 16
  loftq quantize mistralai/Mistral-7B-v0.1 --dry-run
  loftq quantize ./my-model --bits 2 --rank 64 --calibration my-text.jsonl
  loftq quantize ./my-model --push me/my-model-loftq --private
  loftq quantize ./my-model --cluster auto
  loftq quantize ./my-model --backbone ./my-model-gptq --rank 32 --calibration default
"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("model", required=False, type=click.Path())
@option("--model-name-or-path", group="model", metavar="MODEL", help="The same as MODEL.")
@options_of(QuantizeSettings, RunSettings)
@as_json
@debug
def quantize(model: str | None, model_name_or_path: str | None, as_json: bool, **options: Any) -> None:
    """Quantize MODEL and initialize its LoRA adapter.

    MODEL is a folder or the id of a model on the Hub; without it, a small default model is taken. The result is a
    folder with a quantized backbone and, in loftq_init/, its adapter, computed by LoftQ or, given a text with
    --calibration, by a method that comes nearer still. With --backbone the result is an adapter alone, for a model
    that is quantized already. Options may be written with underscores.
    """
    if model and model_name_or_path and model != model_name_or_path:
        raise click.UsageError(f"MODEL is given twice: {model} and {model_name_or_path}")
    settings = given(options)
    check_options(settings, QuantizeSettings, RunSettings)
    if options["quiet"]:
        quiet_hub()
    show_report(loftq.quantize(model or model_name_or_path, **settings), as_json)
