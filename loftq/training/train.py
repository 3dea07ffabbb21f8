"""Trains an adapter with transformers' Trainer: that of an artifact, or a new one on a full-precision model.

The output folder holds the adapter as peft saves it, `training.json` with the settings and the results, and the last
checkpoints, from which an interrupted run continues.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack

from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import IntervalStrategy

from loftq.errors import OptionError
from loftq.formats.artifact import Artifact
from loftq.formats.disk import follow_umask
from loftq.hub.destination import find_destination
from loftq.models.adapters import TRAINING_RECORD
from loftq.models.tokenizers import embedding_rows
from loftq.planning.run import check_resume
from loftq.settings import declared, from_dict
from loftq.training.arguments import arguments_of, explain_settings
from loftq.training.data import explain_cache_errors, hold_out, read_rows
from loftq.training.encoding import Collator, Encoder
from loftq.training.labels import labels_of
from loftq.training.model import Model, find_model, identity_of
from loftq.training.open_model import count_parameters, mode_of, open_to_train
from loftq.training.opened import Opened
from loftq.training.process import explain_memory, hush
from loftq.training.quantize_first import quantized
from loftq.training.rows_hash import rows_hash
from loftq.training.run_folder import (
    begin,
    check_rows,
    check_run_folder,
    explain_write_errors,
    give_up_after,
    last_checkpoint,
    sole_writer,
    write_record,
)
from loftq.training.settings import TrainKeywords, TrainRun, TrainSettings, settings_of
from loftq.training.tasks import TRAINING_TASKS
from loftq.verbs.push import push

_VERSIONS = ("loftq", "torch", "transformers", "peft", "accelerate", "bitsandbytes")


@dataclass(frozen=True)
class Result:
    """The result of a training. Losses are the model's own: for text, the mean of all tokens, in nats.

    The loss of the evaluation is the mean over batches, as transformers computes it; if answers differ in length, it
    depends on the batch size.
    """

    folder: Path
    trainable: int
    total: int
    steps: int
    examples: int
    train_loss: float
    evaluation: dict[str, float]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**asdict(self), "folder": str(self.folder)}

    def table(self) -> str:
        """Return the figures as text for a person."""
        lines = [
            f"{self.steps} steps, {self.examples} examples, {self.seconds:.0f} s",
            f"train loss {self.train_loss:.4f}",
        ]
        lines += [f"held-out {name} {value:.4f}" for name, value in self.evaluation.items()]
        return "\n".join([*lines, f"adapter in {self.folder}"])


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
    with sole_writer(output):
        check_run_folder(output, settings, resume=run.resume, overwrite=run.overwrite)
        return _train_in(output, settings, run)


def _train_in(output: Path, settings: TrainSettings, run: TrainRun) -> Result:
    """Train in a folder that no other run writes into."""
    started = time.perf_counter()
    quiet = run.quiet or os.environ.get("LOCAL_RANK", "0") != "0"  # only the first of several processes reports
    hush(quiet)
    rows = read_rows(settings.data)
    evaluation = read_rows(settings.eval_data, "--eval-data") if settings.eval_data else None
    hashes = _checked_rows(output, settings, run, rows, evaluation)
    backbone = find_model(settings.model)
    arguments = arguments_of(settings, mode_of(settings, backbone))
    if settings.push_to_hub is not None:
        if not isinstance(backbone, Artifact) and (isinstance(backbone, Path) or settings.adapter == "lora"):
            raise OptionError(
                f"--push-to-hub applies only to an artifact of loftq: leave it out, and push {output} with `hf upload`"
            )
        find_destination(settings.push_to_hub).refuse_other_models()
    with explain_memory(), explain_write_errors(output):
        with arguments.main_process_first():
            ready_settings, backbone = quantized(settings, backbone, quiet=quiet)
        record = {"settings": settings.to_dict(), "backbone": identity_of(backbone), "rows": hashes}
        opened = _opened(ready_settings, backbone, arguments, quiet=quiet)
        with explain_cache_errors():
            train_examples, eval_examples = examples(settings, opened, rows, evaluation)
        trainer = _trainer(settings, opened, arguments, train_examples, eval_examples, quiet=quiet)
        resume = run.resume and (output / TRAINING_RECORD).is_file()
        last = last_checkpoint(output) if resume else None
        if trainer.is_world_process_zero():
            if resume:
                give_up_after(last, output)
            else:
                begin(output, record)
        trained = trainer.train(resume_from_checkpoint=None if last is None else str(last))
        result = Result(
            output,
            *count_parameters(opened.model),
            steps=trainer.state.global_step,
            examples=len(train_examples),
            train_loss=_last_loss(trainer, trained.training_loss),
            evaluation={} if eval_examples is None else _measured(trainer),
            seconds=time.perf_counter() - started,
        )
        if trainer.is_world_process_zero():
            if not Path(ready_settings.model).expanduser().is_dir():
                opened.name_backbone(ready_settings.model)  # the name is an id on the Hub
            _finish(opened, settings, record, result, trainer.state.log_history)
    return result


def _checked_rows(output: Path, settings: TrainSettings, run: TrainRun, rows: Any, evaluation: Any) -> dict[str, str]:
    """The hashes of the rows, which a resumed run compares with those that it was begun with.

    Only the first of several processes has them, because only it writes the record.
    """
    if os.environ.get("RANK", "0") != "0":
        return {}
    hashes = {name: rows_hash(part) for name, part in (("data", rows), ("eval_data", evaluation)) if part is not None}
    if run.resume:
        options = {"data": ("--data", settings.data), "eval_data": ("--eval-data", settings.eval_data)}
        check_rows(output, {name: f"{option} {', '.join(files)}" for name, (option, files) in options.items()}, hashes)
    return hashes


def _opened(settings: TrainSettings, backbone: Model, arguments: TrainingArguments, *, quiet: bool) -> Opened:
    """Open the model with its adapter, and report on stderr how many parameters train."""
    opened = open_to_train(settings, backbone, arguments.device)
    opened.name_backbone(str(opened.folder.resolve()))  # peft reads this folder whenever it saves
    if not quiet:
        trainable, total = count_parameters(opened.model)
        share = 100 * trainable / total
        print(f"{trainable:,} of {total:,} parameters train ({share:.2f} %)", file=sys.stderr, flush=True)
    return opened


def _finish(
    opened: Opened, settings: TrainSettings, record: dict[str, Any], result: Result, history: list[dict[str, Any]]
) -> None:
    """Save the adapter, the tokenizer and the record, and push the model if the settings name a repository."""
    opened.model.save_pretrained(result.folder, save_embedding_layers=False)  # they do not train
    opened.tokenizer.save_pretrained(result.folder)
    follow_umask(result.folder)
    versions = {name: version(name) for name in _VERSIONS}
    finished = {"result": result.to_dict(), "history": history, "versions": versions}
    write_record(result.folder, {**record, **finished})
    if settings.push_to_hub is not None:
        push(opened.folder, settings.push_to_hub, adapter=result.folder.resolve())  # --output may be a link


def examples(settings: TrainSettings, opened: Opened, rows: Any, evaluation: Any) -> tuple[Any, Any]:
    """Encode the examples to train on, and those to evaluate on: from their own rows, or held out from the others.

    The second is None if there are too few rows to hold any out.
    """
    encoder = Encoder(
        opened.tokenizer,
        opened.task.name,
        min(settings.cutoff_len, opened.longest),
        settings.max_source_length,
        settings.max_target_length,
        settings.chat_template,
        labels_of(opened.model.config),
        embedding_rows(opened.model),
    )
    task = TRAINING_TASKS[settings.task]
    train_examples = task.encode(rows, settings.columns, encoder)
    if evaluation is None:
        return hold_out(train_examples, settings.seed, shuffle=task.shuffled)
    eval_examples = task.encode(evaluation, settings.columns, encoder)
    if task.check is not None:
        task.check(train_examples, eval_examples)
    return train_examples, eval_examples


def _trainer(
    settings: TrainSettings,
    opened: Opened,
    arguments: TrainingArguments,
    train_examples: Any,
    eval_examples: Any,
    quiet: bool,
) -> Trainer:
    """Make a Trainer. Raises OptionError for settings that it cannot use, before anything is written."""
    if eval_examples is None:
        arguments.eval_strategy = IntervalStrategy.NO
    scores = TRAINING_TASKS[settings.task].scores
    classified = None if scores is None else partial(_classified, scores, opened.model.config.problem_type)
    with explain_settings():
        trainer = Trainer(
            model=opened.model,
            args=arguments,
            train_dataset=train_examples,
            eval_dataset=eval_examples,
            data_collator=Collator(opened.tokenizer.pad_token_id),
            compute_metrics=classified,
            processing_class=opened.tokenizer,
        )
        trainer.create_optimizer_and_scheduler(num_training_steps=1)
    trainer.optimizer = trainer.lr_scheduler = None  # training makes both again, with the actual number of steps
    for printing in (PrinterCallback, ProgressCallback):  # they print to stdout, which is only for the result
        trainer.remove_callback(printing)
    trainer.add_callback(_Permissions())
    if not quiet:
        trainer.add_callback(_Progress())
    return trainer


def _classified(
    scores: Callable[[Any, Any, str | None], dict[str, float]], problem: str | None, output: Any
) -> dict[str, float]:
    # An encoder-decoder returns hidden states after the logits.
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    return scores(logits, output.label_ids, problem)


class _Permissions(TrainerCallback):
    """Lets the permissions of checkpoints follow the umask."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Correct the permissions of the weights that were saved now."""
        if state.is_world_process_zero:
            follow_umask(Path(args.output_dir))


class _Progress(ProgressCallback):
    """Shows a progress bar on stderr, and a line whenever figures are logged."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Write the figures that were logged now."""
        shown = {name: logs[name] for name in ("loss", "learning_rate") if name in logs} | _scores(logs, "eval_")
        if state.is_world_process_zero and self.training_bar is not None and shown:
            line = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
            self.training_bar.write(f"step {state.global_step}: {line}", file=sys.stderr)


def _last_loss(trainer: Trainer, mean: float) -> float:
    """The loss that was logged last, or the mean of the run if none was logged."""
    return float([mean, *(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)][-1])


def _measured(trainer: Trainer) -> dict[str, float]:
    """The evaluation after the last step: the logged one if there is one, otherwise a new one."""
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1:]
    is_current = last and last[0]["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end
    return _scores(last[0] if is_current else trainer.evaluate())


def _scores(logs: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The figures of an evaluation, without its times."""
    figures = {name.removeprefix("eval_"): float(value) for name, value in logs.items() if name.startswith("eval_")}
    return {f"{prefix}{name}": value for name, value in figures.items() if not name.endswith(("runtime", "second"))}
