"""`loftq train`."""

from __future__ import annotations

import os
from typing import Any

import click

import loftq
from loftq.settings import declared
from loftq.training.recipe_files import laid_over, read_recipe, recipe_with
from loftq.training.settings import MODES, TrainRun, TrainSettings, settings_of
from loftq.training.tasks import TRAINING_TASKS

from .options import as_json, debug, given, option, options_of
from .other_names import TranslatingCommand
from .output import Shown, show

_TASKS = "\n".join(f"  {name:<15} {task.text}" for name, task in TRAINING_TASKS.items())
_MODES = "\n".join(f"  {name:<7} {mode.text}: {mode.learning_rate:g}, {mode.reason}" for name, mode in MODES.items())
_EPILOG = f"""\b
Tasks:
{_TASKS}

\b
Adapters, and their learning rates where none is given:
{_MODES}

\b
Examples:
  loftq train model_zoo/loftq/Llama-2-7b-hf-4bit-16rank --task gsm8k --data train.jsonl --output trained
  loftq train MODEL_DIR --data chats.parquet --output trained --batch-size 4 --gradient-accumulation 4
  loftq train Qwen/Qwen3-8B --adapter qlora --rank 32 --data pairs.csv --output trained --dry-run
  loftq train --recipe runs.toml my-run
  torchrun --nproc-per-node 4 -m loftq_cli.main train MODEL_DIR --data chats.parquet --output trained
"""


@click.command(cls=TranslatingCommand, epilog=_EPILOG)
@click.argument("model", metavar="DIR|REPO_ID", required=False, type=click.Path())
@click.argument("name", required=False)
@option(
    "--recipe",
    group="model",
    metavar="FILE",
    type=click.Path(),
    help="File of settings (.toml, .yaml, .json); options override it.",
)
@options_of(TrainSettings, TrainRun)
@option("--dry-run", is_flag=True, help="Show the data, the steps, the memory and the time; nothing is written.")
@as_json
@debug
def train(
    model: str | None, name: str | None, recipe: str | None, as_json: bool, dry_run: bool, **options: Any
) -> None:
    """Train the adapter of DIR, a folder that `loftq quantize` wrote, on your data.

    DIR may also be a full-precision model: it is quantized first, unless --adapter lora is given. With --recipe the
    settings come from a file, NAME is one of its runs, and options on the command line override it. The options of
    the scripts of LoftQ, QA-LoRA and FinLoRA work too, word for word.
    """
    settings = given(options)
    settings |= {table: dict(settings[table]) for table in ("columns", "set") if table in settings}
    words = [word for word in (model, name) if word is not None]
    recipe = recipe or recipe_with(words)
    if recipe is not None:
        settings = laid_over(read_recipe(recipe, *words), settings)
    elif name is not None:
        raise click.UsageError(f"{name}: one DIR is trained; a second name is that of a run in a --recipe")
    else:
        settings["model"] = model
    run_names = declared(TrainRun)  # which an estimate has no use for
    of_training = {key: value for key, value in settings.items() if key not in run_names}
    settings_of({**of_training, **({"output": "-"} if dry_run else {})})  # refuses before seconds of imports
    if dry_run:
        from loftq.training.estimate import estimate  # imports peft, which takes seconds

        result: Shown = estimate(**of_training)
    else:
        result = loftq.train(**settings)
    if os.environ.get("RANK", "0") == "0":  # of several processes, the first one speaks
        show(result, as_json)
