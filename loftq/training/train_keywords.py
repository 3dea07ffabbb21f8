"""The keywords of `loftq.train`, for editors and type checkers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict


class TrainKeywords(TypedDict, total=False):
    """The settings of `TrainSettings` and `TrainRun`."""

    adapter: str | None
    task: str
    data: str | Path | Sequence[str]
    eval_data: str | Path | Sequence[str]
    columns: Mapping[str, str]
    chat_template: bool | None
    packing: bool
    cutoff_len: int
    max_source_length: int | None
    max_target_length: int | None
    num_labels: int | None
    bits: float | None
    method: str | None
    group_size: int | None
    calibration: str | Path | None
    rank: int | None
    alpha: float | None
    rslora: bool | None
    dropout: float | None
    target_modules: Sequence[str] | None
    epochs: float
    max_steps: int | None
    learning_rate: float | None
    lr_scheduler: str
    warmup_steps: int | None
    warmup_ratio: float
    weight_decay: float
    batch_size: int | None
    eval_batch_size: int
    gradient_accumulation: int | None
    gradient_checkpointing: bool | None
    optim: str | None
    seed: int
    set: Mapping[str, Any]
    eval_steps: int | None
    output: str | Path
    save_steps: int | None
    report_to: str | Sequence[str]
    push_to_hub: str | None
    dtype: str | None
    cpu: bool
    offload: str | None
    resume: bool
    overwrite: bool
    quiet: bool
