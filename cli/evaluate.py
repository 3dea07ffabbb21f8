"""`loftq evaluate`."""

from __future__ import annotations

import json
from typing import Any

import click
from click.core import ParameterSource

from loftq.training.evaluate import evaluate as run
from loftq.training.harness import run_harness
from loftq.training.measures import MEASURES

from .options import column, cpu, data, dtype, names

_MEASURES = "\n".join(f"  {name:<15} {measure.text}" for name, measure in MEASURES.items())
_EPILOG = f"""\b
Tasks:
{_MEASURES}

\b
Examples:
  loftq evaluate MODEL_DIR --data wikitext.txt --compare
  loftq evaluate MODEL_DIR --adapter trained --task gsm8k --data test.jsonl --max-examples 200
  loftq evaluate MODEL_DIR --adapter trained --harness arc_easy,hellaswag
"""
_OF_MEASURES = (
    "task",
    "data",
    "compare",
    "card",
    "source",
    "columns",
    "chat_template",
    "window",
    "stride",
    "cutoff_len",
    "max_new_tokens",
)


@click.command(epilog=_EPILOG)
@click.argument("model", metavar="DIR")
@click.option("--adapter", help="The folder of a trained adapter.  [default: the initial one of DIR]")
@click.option("--task", default="perplexity", show_default=True, help="See below.")
@data
@click.option("--compare", is_flag=True, help="Full precision, plain quantization and DIR's own start too.")
@click.option("--card", is_flag=True, help="Write the table into DIR's model card.")
@click.option("--source", metavar="MODEL", help="Full precision.  [default: what DIR was made from]")
@click.option("--harness", type=names, metavar="TASKS", help="Tasks of EleutherAI's lm-eval instead.")
@click.option("--include", metavar="FOLDER", help="More tasks of lm-eval, as YAML.")
@column
@click.option("--chat-template/--no-chat-template", default=None, help="Prompts as the model's template writes them.")
@click.option(
    "--window", type=int, help="Tokens that perplexity sees at once.  [default: 1024, or what the model takes]"
)
@click.option("--stride", type=int, help="Tokens between windows.  [default: --window]")
@click.option("--max-examples", type=int, help="The first ones alone.")
@click.option("--max-new-tokens", type=int, help="Of an answer.  [default: gsm8k 256, summarization 128]")
@click.option("--cutoff-len", type=int, default=1024, show_default=True, help="Tokens of an example.")
@click.option("--batch-size", type=int, default=8, show_default=True)
@dtype
@cpu
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def evaluate(
    model: str, harness: tuple[str, ...] | None, include: str | None, as_json: bool, debug: bool, **options: Any
) -> None:
    """Measure DIR, a folder that `loftq quantize` wrote, with its start or a trained adapter, or any model."""
    del debug  # read by main
    result: Any
    if include is not None and harness is None:
        raise click.UsageError("--include goes with --harness, whose tasks it adds to")
    if harness is not None:
        asked = [
            name
            for name in _OF_MEASURES
            if click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE
        ]
        if asked:
            raise click.UsageError(f"--harness takes no --{asked[0].replace('_', '-')}: its tasks say that themselves")
        rest = {name: value for name, value in options.items() if name not in _OF_MEASURES}
        result = run_harness(model, harness, include=include, **rest)
    elif not options["data"]:
        raise click.UsageError("name what to measure on with --data, or tasks of lm-eval with --harness")
    else:
        result = run(model, **{**options, "columns": dict(options["columns"])})
    click.echo(json.dumps(result.to_dict()) if as_json else result.table())
