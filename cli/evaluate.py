"""`loftq evaluate`."""

from __future__ import annotations

from typing import Any

import click

import loftq
from loftq.settings import option_name
from loftq.training.evaluate_settings import EvaluateSettings
from loftq.training.tasks import MEASURES

from .options import Command, as_json, check_options, comma_names, debug, given, option, options_of
from .output import show

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
_OF_BOTH = ("adapter", "max_examples", "batch_size", "dtype", "cpu", "quiet")  # options that lm-eval's tasks take too


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("model", metavar="DIR|REPO_ID", type=click.Path())
@options_of(EvaluateSettings)
@option(
    "--harness",
    group="data",
    type=comma_names,
    metavar="TASKS",
    help="Tasks of EleutherAI's lm-eval, instead of --task.",
)
@option("--include", group="data", metavar="FOLDER", help="Folder with more tasks for --harness, as YAML.")
@as_json
@debug
def evaluate(model: str, harness: tuple[str, ...] | None, include: str | None, as_json: bool, **options: Any) -> None:
    """Measure a model: DIR is a folder that `loftq quantize` wrote, or any model.

    A folder is measured with its initial adapter, or with a trained one.
    """
    settings = given(options)
    if include is not None and harness is None:
        raise click.UsageError("--include goes with --harness, whose tasks it adds to")
    if harness is not None:
        for name in settings:
            if name not in _OF_BOTH:
                raise click.UsageError(f"--harness takes no {option_name(name)}: its tasks say that themselves")
        from loftq.training.harness import run_harness  # imports transformers, which takes seconds

        show(run_harness(model, harness, include=include, **settings), as_json)
        return
    if not settings.get("data"):
        raise click.UsageError("name what to measure on with --data, or tasks of lm-eval with --harness")
    settings |= {"columns": dict(settings["columns"])} if "columns" in settings else {}
    check_options(settings, EvaluateSettings)
    show(loftq.evaluate(model, **settings), as_json)
