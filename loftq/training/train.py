"""Trains an adapter with transformers' Trainer: that of an artifact, or a new one on a full-precision model.

The output folder holds the adapter as peft saves it, `training.json` with the settings and the results, and the last
checkpoints, from which an interrupted run continues.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack

import torch
from accelerate.utils import broadcast_object_list
from transformers import ProgressCallback, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import IntervalStrategy

from loftq.chatter import silenced_with_data
from loftq.formats.artifact import CARD
from loftq.formats.disk import follow_umask, write_whole
from loftq.hub.destination import find_destination
from loftq.hub.source import Source
from loftq.models.adapters import TRAINING_RECORD
from loftq.models.first_factor import keep_inputs_once
from loftq.models.heap import own_pages
from loftq.models.image_text import copy_processor
from loftq.models.second_factor import add_in_place
from loftq.planning.run import check_resume
from loftq.settings import declared, from_dict
from loftq.training.adapter_card import adapter_card
from loftq.training.arguments import arguments_of, explain_settings
from loftq.training.batches import Split
from loftq.training.callbacks import Permissions, Progress
from loftq.training.collators import collator_for
from loftq.training.data import explain_cache_errors, read_rows
from loftq.training.lengths import sizes
from loftq.training.memory import fitting_split
from loftq.training.model import Model, find_model, identity_of
from loftq.training.open_model import count_parameters, mode_of, open_to_train
from loftq.training.opened import Opened
from loftq.training.packing import check_apart
from loftq.training.prepare import check_push, examples, prepare
from loftq.training.process import explain_memory
from loftq.training.quantize_first import quantized
from loftq.training.result import Result, next_steps
from loftq.training.rows_hash import rows_hash
from loftq.training.run_folder import (
    begin,
    check_rows,
    check_run_folder,
    explain_write_errors,
    give_up_after,
    last_checkpoint,
    sole_writer,
    split_before,
    write_record,
)
from loftq.training.settings import TrainRun, TrainSettings, settings_of
from loftq.training.sharding import check_launcher, whole_adapter
from loftq.training.steps import shorten_warmup, steps_of
from loftq.training.tasks import TRAINING_TASKS
from loftq.training.train_keywords import TrainKeywords
from loftq.training.trainer import LeanTrainer, last_loss, last_scores
from loftq.verbs.push import push

_log = logging.getLogger(__name__)
_VERSIONS = ("loftq", "torch", "transformers", "peft", "accelerate", "bitsandbytes")


def train(model: str | Path | None = None, **settings: Unpack[TrainKeywords]) -> Result:
    """Train the adapter of an artifact, or a new one on a full-precision model, which is quantized first.

    The keywords are the options of `loftq train --help`, with underscores; `data` and `output` are required, and
    `columns` is `--column`. With `resume` an interrupted run continues from its last checkpoint. Raises LoftQError.
    """
    run_values = {name: settings[name] for name in declared(TrainRun) if name in settings}  # type: ignore[literal-required]
    values = {name: value for name, value in settings.items() if name not in run_values}
    return _train(settings_of({"model": model, **values}), from_dict(TrainRun, run_values))


def _train(settings: TrainSettings, run: TrainRun) -> Result:
    check_resume(run.resume, run.overwrite)
    output = Path(settings.output)
    with silenced_with_data(_is_quiet(run)), sole_writer(output):
        check_run_folder(output, settings, resume=run.resume, overwrite=run.overwrite)
        return _train_in(output, settings, run)


def _is_quiet(run: TrainRun) -> bool:
    return run.quiet or not _reports()


def _reports() -> bool:
    """Whether this is the first of several processes, which alone reports."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@dataclass(frozen=True)
class _Ready:
    """What is known of a training before any weight is loaded."""

    arguments: TrainingArguments
    split: Split
    train_examples: Any
    eval_examples: Any
    hashes: dict[str, str]  # of the rows


def _train_in(output: Path, settings: TrainSettings, run: TrainRun) -> Result:
    """Train in a folder that no other run writes into."""
    started = time.perf_counter()
    quiet = _is_quiet(run)
    resume = run.resume and (output / TRAINING_RECORD).is_file()
    with explain_memory():
        ready = _ready(output, settings, resume=resume)
    with explain_memory(), explain_write_errors(output):
        with ready.arguments.main_process_first():
            ready_settings, backbone = quantized(settings, find_model(settings.model), quiet=quiet)
        record = {
            "settings": settings.to_dict(),
            "split": ready.split.to_dict(),
            "backbone": identity_of(backbone, output),
            "rows": ready.hashes,
        }
        opened = _opened(ready_settings, backbone, ready.arguments)
        trainer = _trainer(settings, opened, ready, quiet=quiet)
        last = last_checkpoint(output) if resume else None
        if trainer.is_world_process_zero():
            if resume:
                give_up_after(last, output)
            else:
                begin(output, record)
        with own_pages(ready.arguments.device):
            trained = trainer.train(resume_from_checkpoint=None if last is None else str(last))
        base = backbone.name if isinstance(backbone, Source) else None
        result = Result(
            output,
            *count_parameters(opened.model),
            steps=trainer.state.global_step,
            examples=len(ready.train_examples),
            train_loss=last_loss(trainer, trained.training_loss),
            evaluation={} if ready.eval_examples is None else last_scores(trainer),
            seconds=time.perf_counter() - started,
            next_steps=next_steps(output, settings.task, opened.task.name, base),
        )
        weights = whole_adapter(trainer)
        if trainer.is_world_process_zero():
            if not Path(ready_settings.model).expanduser().is_dir():
                opened.name_backbone(ready_settings.model)  # the name is an id on the Hub
            _finish(opened, settings, backbone, {**record, "history": trainer.state.log_history}, result, weights)
    return result


def _ready(output: Path, settings: TrainSettings, *, resume: bool) -> _Ready:
    """Check the settings, encode the data, choose how a step is computed, and report it.

    Raises LoftQError for settings or data that cannot be used, before anything is quantized, loaded or written.
    """
    rows = read_rows(settings.data)
    evaluation = read_rows(settings.eval_data, "--eval-data") if settings.eval_data else None
    hashes = _checked_rows(output, settings, rows, evaluation, resume=resume)
    backbone = find_model(settings.model, headers_only=True)
    mode = mode_of(settings, backbone)
    check_launcher(backbone)
    arguments_of(settings, mode)  # which refuses some settings, before the data are encoded
    check_push(settings, backbone)
    if settings.push_to_hub is not None:
        find_destination(settings.push_to_hub).refuse_other_models()
    prepared = prepare(settings, backbone)
    with explain_cache_errors():
        train_examples, eval_examples = examples(settings, prepared, rows, evaluation)
    split, note = _split(output if resume else None, settings, prepared, backbone, train_examples)
    arguments = arguments_of(split.into(settings), mode)
    notes = [note, shorten_warmup(arguments, steps_of(arguments, len(train_examples)))]
    if _reports():
        _report(train_examples, eval_examples, notes)
    return _Ready(arguments, split, train_examples, eval_examples, hashes)


def _split(
    resumed: Path | None, settings: TrainSettings, prepared: Opened, backbone: Model, train_examples: Any
) -> tuple[Split, str | None]:
    """How a step is computed: as the run that is resumed was begun, or else so that the training fits the device.

    Of several processes, the first one decides. The second value is a line for the user.
    """
    earlier = None if resumed is None else split_before(resumed)
    if earlier is not None:
        return Split(**earlier), None
    chosen = [fitting_split(settings, prepared, backbone, train_examples)]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        broadcast_object_list(chosen, from_process=0)
    return chosen[0]


def _report(train_examples: Any, eval_examples: Any, notes: list[str | None]) -> None:
    """Say, before the long work, how much is learned from, and what was changed in the settings."""
    held = "" if eval_examples is None else f", {len(eval_examples):,} to evaluate on"
    lengths = sizes(train_examples)
    tokens = f"{lengths.mean():,.0f} tokens on average, at most {lengths.max():,}"
    lines = [f"{len(train_examples):,} examples to train on{held}: {tokens}", *notes]
    for line in filter(None, lines):
        _log.info(line)


def _checked_rows(output: Path, settings: TrainSettings, rows: Any, evaluation: Any, *, resume: bool) -> dict[str, str]:
    """The hashes of the rows, which a resumed run compares with those that it was begun with.

    Only the first of several processes has them, because only it writes the record.
    """
    if os.environ.get("RANK", "0") != "0":
        return {}
    hashes = {name: rows_hash(part) for name, part in (("data", rows), ("eval_data", evaluation)) if part is not None}
    if resume:
        options = {"data": ("--data", settings.data), "eval_data": ("--eval-data", settings.eval_data)}
        check_rows(output, {name: f"{option} {', '.join(files)}" for name, (option, files) in options.items()}, hashes)
    return hashes


def _opened(settings: TrainSettings, backbone: Model, arguments: TrainingArguments) -> Opened:
    """Open the model with its adapter, and report how many parameters train."""
    set_seed(settings.seed)  # a new adapter begins with random values
    opened = open_to_train(settings, backbone, arguments.device)
    keep_inputs_once(opened.model)
    add_in_place(opened.model)
    if settings.packing:
        check_apart(opened.model)
    opened.name_backbone(str(opened.folder.resolve()))  # peft reads this folder whenever it saves
    if _reports():
        trainable, total = count_parameters(opened.model)
        share = 100 * trainable / total
        _log.info(f"{trainable:,} of {total:,} parameters train ({share:.2f} %)")
    return opened


def _finish(
    opened: Opened,
    settings: TrainSettings,
    backbone: Model,
    record: dict[str, Any],
    result: Result,
    weights: dict[str, torch.Tensor] | None,
) -> None:
    """Save the adapter, the tokenizer, the card and the record, and push the model if the settings say so.

    `weights` are the tensors of the adapter if the model itself has only parts of them.
    """
    opened.model.save_pretrained(result.folder, state_dict=weights, save_embedding_layers=False)  # they do not train
    opened.tokenizer.save_pretrained(result.folder)
    copy_processor(opened.folder, result.folder)
    follow_umask(result.folder)
    versions = {name: version(name) for name in _VERSIONS}
    figures = {name: value for name, value in result.to_dict().items() if name != "next_steps"}
    finished = {**record, "result": figures, "versions": versions}
    write_whole(result.folder / CARD, adapter_card(settings, backbone, finished))  # peft's own is an empty template
    write_record(result.folder, finished)
    if settings.push_to_hub is not None:
        push(opened.folder, settings.push_to_hub, adapter=result.folder.resolve())  # --output may be a link


def _trainer(settings: TrainSettings, opened: Opened, ready: _Ready, *, quiet: bool) -> Trainer:
    """Make a Trainer. Raises OptionError for settings that it cannot use, before anything is written."""
    if ready.eval_examples is None:
        ready.arguments.eval_strategy = IntervalStrategy.NO
    scores = TRAINING_TASKS[settings.task].scores
    classified = None if scores is None else partial(_classified, scores, opened.model.config.problem_type)
    with explain_settings():
        trainer = LeanTrainer(
            model=opened.model,
            args=ready.arguments,
            train_dataset=ready.train_examples,
            eval_dataset=ready.eval_examples,
            data_collator=collator_for(ready.train_examples, opened, (*settings.data, *settings.eval_data)),
            compute_metrics=classified,
            processing_class=opened.tokenizer,
        )
        trainer.create_optimizer_and_scheduler(num_training_steps=1)
    trainer.optimizer = trainer.lr_scheduler = None  # training makes both again, with the actual number of steps
    for printing in (PrinterCallback, ProgressCallback):  # they print to stdout, which is only for the result
        trainer.remove_callback(printing)
    trainer.add_callback(Permissions())
    if not quiet:
        trainer.add_callback(Progress())
    return trainer


def _classified(
    scores: Callable[[Any, Any, str | None], dict[str, float]], problem: str | None, output: Any
) -> dict[str, float]:
    # An encoder-decoder returns hidden states after the logits.
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    return scores(logits, output.label_ids, problem)
