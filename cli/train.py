"""`loftq train`."""

from __future__ import annotations

import json
import os
from typing import Any

import click

import loftq
from loftq.training.recipe_files import laid_over, read_recipe
from loftq.training.settings import MODES, Settings
from loftq.training.tasks import TRAINING_TASKS

from .options import column, cpu, data, dtype, names, setting

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


@click.command(epilog=_EPILOG)
@click.argument("model", metavar="DIR", required=False)
@click.argument("name", required=False)
@click.option("--recipe", metavar="FILE", help="Settings as .toml, .yaml or .json; options go before them.")
@click.option("--task", help=f"See below.  [default: {Settings.task}]")
@data
@click.option("--output", help="The folder to write: the adapter, checkpoints, training.json.")
@click.option("--eval-data", multiple=True, help="As --data.  [default: a twentieth of it is held out]")
@column
@click.option(
    "--chat-template/--no-chat-template",
    default=None,
    help="Prompts as the model's template writes them.  [default: in sft]",
)
@click.option("--adapter", help="lora, qlora or qalora, for a model that is not quantized.  [default: qlora]")
@click.option(
    "--bits", type=float, help="Of a model that is quantized first; this and the next as in `loftq quantize`."
)
@click.option("--rank", type=int)
@click.option("--alpha", type=float)
@click.option("--dropout", type=float)
@click.option("--target-modules", type=names)
@click.option("--method")
@click.option("--calibration", metavar="TEXT")
@click.option("--group-size", type=int)
@click.option("--num-labels", type=int, help="Classes; 1 for numbers.")
@click.option("--epochs", type=float, help=f"[default: {Settings.epochs:g}]")
@click.option("--max-steps", type=int, help="Instead of epochs.")
@click.option("--learning-rate", type=float, help="[default: the adapter's, below]")
@click.option("--lr-scheduler", help=f"[default: {Settings.lr_scheduler}]")
@click.option("--warmup-steps", type=int)
@click.option("--warmup-ratio", type=float, help=f"Of the steps.  [default: {Settings.warmup_ratio}]")
@click.option("--weight-decay", type=float, help=f"[default: {Settings.weight_decay:g}]")
@click.option("--batch-size", type=int, help=f"Examples a device and step.  [default: {Settings.batch_size}]")
@click.option("--eval-batch-size", type=int, help=f"[default: {Settings.eval_batch_size}]")
@click.option("--gradient-accumulation", type=int, help=f"[default: {Settings.gradient_accumulation}]")
@click.option("--max-source-length", type=int, help="Tokens of a prompt or document.  [default: --cutoff-len]")
@click.option("--max-target-length", type=int, help="Tokens of an answer or summary.  [default: --cutoff-len]")
@click.option(
    "--cutoff-len", type=int, help=f"Tokens of an example.  [default: {Settings.cutoff_len}, or what the model takes]"
)
@click.option("--seed", type=int, help=f"[default: {Settings.seed}]")
@click.option("--eval-steps", type=int, help="[default: ten times a run]")
@click.option("--save-steps", type=int, help="[default: ten times a run; the last two stay]")
@click.option("--report-to", multiple=True, help="tensorboard, wandb, ...")
@click.option("--gradient-checkpointing", is_flag=True, default=None, help="Less memory, a third slower.")
@click.option("--optim", help="[default: paged_adamw_8bit on CUDA, adamw_torch elsewhere]")
@dtype
@cpu
@click.option(
    "--set", "set", type=setting, multiple=True, metavar="NAME=VALUE", help="Anything else of TrainingArguments."
)
@click.option("--push-to-hub", metavar="REPO_ID", help="Push DIR with the adapter in a subfolder, as `loftq push`.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier training.")
@click.option("--dry-run", is_flag=True, help="Show parameters and memory; nothing is trained or written.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def train(
    model: str | None,
    name: str | None,
    recipe: str | None,
    as_json: bool,
    debug: bool,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Train the adapter of DIR, a folder that `loftq quantize` wrote, on your data.

    DIR may be a full-precision model too, which is quantized first (--adapter lora: which is not). With --recipe the
    settings come from a file, NAME of those that hold several; options on the command line go before them.
    """
    del debug  # read by main
    given = {key: value for key, value in options.items() if value not in (None, ())}
    given |= {table: dict(given[table]) for table in ("columns", "set") if table in given}
    words = [word for word in (model, name) if word is not None]
    if recipe is not None:
        given = laid_over(read_recipe(recipe, *words), given)
    elif name is not None:
        raise click.UsageError(f"{name}: one DIR is trained; a second name is that of a run in a --recipe")
    else:
        given["model"] = model
    if dry_run:
        from loftq.training.estimate import estimate  # imports peft, which takes seconds

        result: Any = estimate(**given)
    else:
        result = loftq.train(**given, resume=resume, overwrite=overwrite, quiet=quiet)
    if os.environ.get("RANK", "0") == "0":  # of several processes, the first one speaks
        click.echo(json.dumps(result.to_dict()) if as_json else result.table())
