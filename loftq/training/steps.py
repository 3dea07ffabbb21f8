"""The number of steps of a training, as transformers counts them, and a warm-up that leaves some of them."""

from __future__ import annotations

import math

from transformers import SchedulerType, TrainingArguments

_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")


def steps_of(arguments: TrainingArguments, examples: int, processes: int | None = None) -> int:
    """The number of steps on so many examples. `processes` are by default those that run now."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    count = arguments.world_size if processes is None else processes
    rounded = math.floor if arguments.dataloader_drop_last else math.ceil
    batches = math.ceil(rounded(examples / arguments.train_batch_size) / count)
    steps = max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)
    return math.ceil(arguments.num_train_epochs * steps)


def shorten_warmup(arguments: TrainingArguments, steps: int) -> str | None:
    """Leave a step at the full rate where the warm-up would last the whole run, and return a line that says so.

    In the first step of a warm-up the rate is 0, so a run of a single step would learn nothing.
    """
    asked = arguments.get_warmup_steps(steps)
    if asked < steps or SchedulerType(arguments.lr_scheduler_type).value in _WITHOUT_WARMUP:
        return None
    arguments.warmup_steps = steps - 1
    return f"the warm-up of {_counted(asked)} is shortened to {steps - 1}: the whole run has {_counted(steps)}"


def _counted(steps: int) -> str:
    return "1 step" if steps == 1 else f"{steps:,} steps"
