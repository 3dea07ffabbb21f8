"""Train an adapter by transformers' Trainer: an artifact's own, or a new one on a full-precision model.

The folder that is left holds the adapter as peft saves it, `training.json`, the settings and what was measured, and the
last checkpoints, from which a run that was cut off goes on.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack

from transformers import ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import IntervalStrategy

from loftq.errors import OptionError
from loftq.formats.artifact import Artifact
from loftq.formats.disk import explain_os_errors
from loftq.hub.destination import find_destination
from loftq.models.adapters import TRAINING_RECORD
from loftq.settings import declared, from_dict
from loftq.training.arguments import arguments_of, explain_settings
from loftq.training.data import hold_out, read_rows
from loftq.training.encoding import Collator, Encoder
from loftq.training.model import Model, find_model, identity_of
from loftq.training.opening import Opened, count_parameters, mode_of, open_to_train
from loftq.training.process import explain_memory, hush
from loftq.training.quantize_first import quantized
from loftq.training.run_folder import begin, check_run_folder, give_up_after, last_checkpoint, write_record
from loftq.training.settings import TrainKeywords, TrainRun, TrainSettings, settings_of
from loftq.training.tasks import TRAINING_TASKS
from loftq.training.tasks.classification import scores
from loftq.verbs.push import push

_VERSIONS = ("loftq", "torch", "transformers", "peft", "accelerate", "bitsandbytes")


@dataclass(frozen=True)
class Result:
    """What a training did. Losses are means a token, in nats, or of what else the model's own loss is.

    That of the evaluation is the mean of its batches', as transformers has it: of answers of unlike lengths it depends
    on how many examples a batch holds.
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
        """Plain values."""
        return {**asdict(self), "folder": str(self.folder)}

    def table(self) -> str:
        """The figures, for a person."""
        lines = [
            f"{self.steps} steps, {self.examples} examples, {self.seconds:.0f} s",
            f"train loss {self.train_loss:.4f}",
        ]
        lines += [f"held-out {name} {value:.4f}" for name, value in self.evaluation.items()]
        return "\n".join([*lines, f"adapter in {self.folder}"])


def train(model: str | Path | None = None, **settings: Unpack[TrainKeywords]) -> Result:
    """Train the adapter of an artifact, or a new one on a full-precision model, which is quantized first.

    The keywords are the options of `loftq train --help`, with underscores: at least `data` and `output`; `columns` is
    `--column`. With `resume` an interrupted run continues from its last checkpoint. Raises LoftQError.
    """
    run_values = {name: settings[name] for name in declared(TrainRun) if name in settings}  # type: ignore[literal-required]
    values = {name: value for name, value in settings.items() if name not in run_values}
    return _train(settings_of({"model": model, **values}), from_dict(TrainRun, run_values))


def _train(settings: TrainSettings, run: TrainRun) -> Result:
    started = time.perf_counter()
    output = Path(settings.output)
    check_run_folder(output, settings, resume=run.resume, overwrite=run.overwrite)
    quiet = run.quiet or os.environ.get("LOCAL_RANK", "0") != "0"  # of several processes, the first one speaks
    hush(quiet)
    rows = read_rows(settings.data)
    evaluation = read_rows(settings.eval_data, "--eval-data") if settings.eval_data else None
    found = find_model(settings.model)
    arguments = arguments_of(settings, mode_of(settings, found))
    if settings.push_to_hub is not None:
        if not isinstance(found, Artifact) and (isinstance(found, Path) or settings.adapter == "lora"):
            raise OptionError(f"--push-to-hub goes with an artifact of ours: `hf upload` sends {output} as it is")
        find_destination(settings.push_to_hub).refuse_other_models()
    with explain_memory(), explain_os_errors(output):
        with arguments.main_process_first():
            ready, found = quantized(settings, found, quiet=quiet)
        backbone = identity_of(found)
        opened = _opened(ready, found, arguments, quiet=quiet)
        learned, held = examples(settings, opened, rows, evaluation)
        trainer = _trainer(settings, opened, arguments, learned, held, quiet=quiet)
        resume = run.resume and (output / TRAINING_RECORD).is_file()
        last = last_checkpoint(output) if resume else None
        if trainer.is_world_process_zero():
            if resume:
                give_up_after(last, output)
            else:
                begin(output, settings, backbone)
        done = trainer.train(resume_from_checkpoint=None if last is None else str(last))
        result = Result(
            output,
            *count_parameters(opened.model),
            steps=trainer.state.global_step,
            examples=len(learned),
            train_loss=_last_loss(trainer, done.training_loss),
            evaluation={} if held is None else _measured(trainer),
            seconds=time.perf_counter() - started,
        )
        if trainer.is_world_process_zero():
            if not Path(ready.model).expanduser().is_dir():
                opened.name_backbone(ready.model)  # an id on the Hub
            _finish(opened, settings, backbone, result, trainer.state.log_history)
    return result


def _opened(settings: TrainSettings, found: Model, arguments: TrainingArguments, *, quiet: bool) -> Opened:
    """The model with its adapter, after saying how much of it trains."""
    opened = open_to_train(settings, found, arguments.device)
    opened.name_backbone(str(opened.folder.resolve()))  # at which peft looks whenever it saves
    if not quiet:
        trainable, total = count_parameters(opened.model)
        share = 100 * trainable / total
        print(f"{trainable:,} of {total:,} parameters train ({share:.2f} %)", file=sys.stderr, flush=True)
    return opened


def _finish(
    opened: Opened, settings: TrainSettings, backbone: dict[str, str], result: Result, history: list[dict[str, Any]]
) -> None:
    """The adapter and the tokenizer, the record, and the repository where one is asked for."""
    opened.model.save_pretrained(result.folder, save_embedding_layers=False)  # which do not train
    opened.tokenizer.save_pretrained(result.folder)
    versions = {name: version(name) for name in _VERSIONS}
    asked = {"settings": settings.to_dict(), "backbone": backbone}
    write_record(result.folder, {**asked, "result": result.to_dict(), "history": history, "versions": versions})
    if settings.push_to_hub is not None:
        push(opened.folder, settings.push_to_hub, adapter=result.folder)


def examples(settings: TrainSettings, opened: Opened, rows: Any, evaluation: Any) -> tuple[Any, Any]:
    """What is learned, and what is evaluated on: of rows of its own, or a slice of the others; None of too few."""
    encoder = Encoder(
        opened.tokenizer,
        opened.task.name,
        min(settings.cutoff_len, opened.longest),
        settings.max_source_length,
        settings.max_target_length,
        settings.chat_template,
        int(opened.model.config.num_labels),
    )
    task = TRAINING_TASKS[settings.task]
    learned = task.encode(rows, settings.columns, encoder)
    if evaluation is None:
        return hold_out(learned, settings.seed, shuffle=task.shuffled)
    return learned, task.encode(evaluation, settings.columns, encoder)


def _trainer(
    settings: TrainSettings, opened: Opened, arguments: TrainingArguments, learned: Any, held: Any, quiet: bool
) -> Trainer:
    """Raises OptionError for settings that it fails on, before anything is written."""
    if held is None:
        arguments.eval_strategy = IntervalStrategy.NO
    with explain_settings():
        trainer = Trainer(
            model=opened.model,
            args=arguments,
            train_dataset=learned,
            eval_dataset=held,
            data_collator=Collator(opened.tokenizer.pad_token_id),
            compute_metrics=_classified if settings.task == "classification" else None,
            processing_class=opened.tokenizer,
        )
        trainer.create_optimizer_and_scheduler(num_training_steps=1)
    trainer.optimizer = trainer.lr_scheduler = None  # both are made anew, for as many steps as there are
    for printing in (PrinterCallback, ProgressCallback):  # to stdout, which is the result's
        trainer.remove_callback(printing)
    if not quiet:
        trainer.add_callback(_Progress())
    return trainer


def _classified(found: Any) -> dict[str, float]:
    logits = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
    return scores(logits, found.label_ids)  # an encoder-decoder gives hidden states after them


class _Progress(ProgressCallback):
    """A bar, and a line a logging, on stderr."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """What was measured since the last line."""
        shown = {name: logs[name] for name in ("loss", "learning_rate") if name in logs} | _scores(logs, "eval_")
        if state.is_world_process_zero and self.training_bar is not None and shown:
            line = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
            self.training_bar.write(f"step {state.global_step}: {line}", file=sys.stderr)


def _last_loss(trainer: Trainer, mean: float) -> float:
    """What was logged last, or where nothing was, the mean of the run."""
    return float([mean, *(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)][-1])


def _measured(trainer: Trainer) -> dict[str, float]:
    """The evaluation of the last step, which often is made already."""
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1:]
    made = last and last[0]["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end
    return _scores(last[0] if made else trainer.evaluate())


def _scores(logs: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """What an evaluation measured of the model, without its times."""
    found = {name.removeprefix("eval_"): float(value) for name, value in logs.items() if name.startswith("eval_")}
    return {f"{prefix}{name}": value for name, value in found.items() if not name.endswith(("runtime", "second"))}
