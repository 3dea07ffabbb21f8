"""Estimates a training before any weight is read: its data, its steps, its memory and its time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loftq.models.devices import compute_dtype, device_to_run, free_memory
from loftq.models.training_memory import embedding_width
from loftq.training.arguments import arguments_of
from loftq.training.batches import Split, choose_split
from loftq.training.data import explain_cache_errors, read_rows
from loftq.training.lengths import Lengths, longest_of, measure_lengths, padded_tokens, shown_example, sizes
from loftq.training.memory import on_meta
from loftq.training.model import find_model
from loftq.training.open_model import mode_of
from loftq.training.opened import Opened
from loftq.training.pace import duration, operations, reached_rate
from loftq.training.prepare import encoder_for, examples, prepare
from loftq.training.settings import TrainSettings, settings_of
from loftq.training.steps import shorten_warmup, steps_of
from loftq.training.tasks import TRAINING_TASKS


@dataclass(frozen=True)
class DataSummary:
    """The data as a training will use it: numbers of rows and examples, columns, lengths, and one example as text."""

    rows: int
    examples: int
    held_out: int
    used: Sequence[str]
    unused: Sequence[str]
    lengths: Lengths
    example: str

    def lines(self) -> list[tuple[str, str]]:
        """Names and values for a person."""
        return [
            ("data", f"{self.rows:,} rows: {self.examples:,} examples to train on, {self.held_out:,} to evaluate on"),
            ("columns used", ", ".join(self.used)),
            *([("columns not used", ", ".join(self.unused))] if self.unused else []),
            ("lengths", str(self.lengths)),
        ]


@dataclass(frozen=True)
class Estimate:
    """An estimate of a training. Memory is in bytes on each device, without that of the program itself.

    `rate` is in operations per second, and `seconds` are without loading, quantizing and evaluations.
    """

    model: str
    trainable: int
    total: int
    batch: tuple[int, int]  # examples, tokens
    weights: int
    adapter: int  # with its gradients and the optimizer's state
    activations: int
    experts: int  # the group that is unpacked, and with `--offload` the codes of the groups that are on the device
    offloaded: int  # the codes and scales of all experts, in main memory instead of on the device
    data: DataSummary
    steps: int
    split: Split
    seconds: float
    rate: float
    notes: tuple[str, ...] = ()

    @property
    def memory(self) -> int:
        """The sum of all parts, in bytes."""
        return self.weights + self.adapter + self.activations + self.experts

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**asdict(self), "batch": list(self.batch), "memory": self.memory, "notes": list(self.notes)}

    def table(self) -> str:
        """Return the figures as text for a person."""
        share = 100 * self.trainable / self.total
        rows, tokens = self.batch
        kept = ", with gradient checkpointing" if self.split.gradient_checkpointing else ""
        width = 18
        lines = [f"{name:<{width}}{value}" for name, value in self.data.lines()]
        lines += ["", "the first example, with what is learned between ⟦ and ⟧:", self.data.example, ""]
        lines += [
            f"{self.trainable:,} of {self.total:,} parameters train ({share:.2f} %)",
            f"{self.weights / 1e9:8.2f} GB  weights",
            f"{self.adapter / 1e9:8.2f} GB  adapter, its gradients, the optimizer",
            f"{self.activations / 1e9:8.2f} GB  activations of {rows} examples of {tokens} tokens{kept}",
            *([f"{self.experts / 1e9:8.2f} GB  experts that are unpacked at a time"] if self.experts else []),
            f"{self.memory / 1e9:8.2f} GB  in all, on each device, without the program itself",
            *([f"{self.offloaded / 1e9:8.2f} GB  in main memory besides: the experts"] if self.offloaded else []),
            f"{self.steps:,} steps with {self.split}",
            f"time: {duration(self.seconds)}, at {self.rate / 1e9:,.0f} billion operations a second: a third of what a "
            "matrix product reaches here now; loading, quantizing and evaluations come on top",
            *self.notes,
            "To use less memory, lower --batch-size or --cutoff-len, or add --gradient-checkpointing.",
        ]
        return "\n".join(lines)


def estimate(model: str | None = None, **settings: Any) -> Estimate:
    """Estimate what `train` needs with these settings.

    Nothing is written, the data are read, and only the headers of the weights. Raises LoftQError.
    """
    asked = settings_of({"model": model, **settings})
    device = device_to_run(asked.cpu)
    dtype = compute_dtype(asked.dtype, device)
    backbone = find_model(asked.model, headers_only=True)
    opened = prepare(asked, backbone)
    data, found, tokens = _read_data(asked, opened)
    planned = on_meta(asked, backbone, dtype)

    def need(batch: int, checkpointing: bool) -> int:
        kept = planned.activations(asked, (batch, tokens), device, checkpointing=checkpointing)
        return planned.fixed_bytes(asked, device) + kept

    split, note = choose_split(asked, need, free_memory(device))
    arguments = arguments_of(split.into(asked), mode_of(asked, backbone))
    steps = steps_of(arguments, data.examples)
    in_a_step = split.gradient_accumulation * padded_tokens(found, min(split.batch_size, data.examples), asked.seed)
    counted = operations(opened.model, steps * in_a_step, checkpointing=split.gradient_checkpointing)
    rate = reached_rate(embedding_width(opened.model), dtype, device)
    return Estimate(
        model=asked.model,
        trainable=planned.trainable,
        total=planned.total,
        batch=(split.batch_size, tokens),
        weights=planned.weights,
        adapter=planned.adapter_bytes(asked, device),
        activations=need(split.batch_size, split.gradient_checkpointing) - planned.fixed_bytes(asked, device),
        experts=planned.experts,
        offloaded=planned.offloaded,
        data=data,
        steps=steps,
        split=split,
        seconds=counted / rate,
        rate=rate,
        notes=tuple(line for line in (note, shorten_warmup(arguments, steps)) if line is not None),
    )


def _read_data(settings: TrainSettings, opened: Opened) -> tuple[DataSummary, np.ndarray, int]:
    """The summary of the data, the lengths of the examples to train on, and the tokens of the longest."""
    rows = read_rows(settings.data)
    evaluation = read_rows(settings.eval_data, "--eval-data") if settings.eval_data else None
    encoder = encoder_for(settings, opened)
    with explain_cache_errors():
        train_examples, eval_examples = examples(settings, opened, rows, evaluation)
        lengths = measure_lengths(rows, settings, encoder, train_examples)
    used = set(TRAINING_TASKS[settings.task].used_columns(rows, settings.columns))
    summary = DataSummary(
        len(rows),
        len(train_examples),
        0 if eval_examples is None else len(eval_examples),
        [name for name in rows.column_names if name in used],
        [name for name in rows.column_names if name not in used],
        lengths,
        shown_example(train_examples[0], encoder),
    )
    return summary, sizes(train_examples), longest_of(train_examples, encoder)
