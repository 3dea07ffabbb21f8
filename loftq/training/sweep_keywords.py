"""The keywords of `loftq.sweep`, for editors and type checkers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import torch


class SweepKeywords(TypedDict, total=False):
    """The settings of `SweepSettings`, and those of `loftq.quantize` that all cells share."""

    bits: float | str | Sequence[float] | Sequence[str]
    rank: int | str | Sequence[int] | Sequence[str]
    method: str | Sequence[str]
    seeds: int | str | Sequence[int] | Sequence[str]
    train: str | Path | None
    evaluate: str | Path | Sequence[str]
    window: int | None
    stride: int | None
    max_windows: int | None
    dtype: str | None
    output: str | Path | None
    dry_run: bool
    quiet: bool
    quant_type: str | None
    expert_bits: float | None
    allocation: str | None
    iters: int | None
    scales: str | None
    rounding: str | None
    block_size: int | None
    group_size: int | None
    zero_point: str | None
    double_quant: bool
    format: str | None
    compute_dtype: str
    svd: str
    adapter: str
    expert_rank: int | None
    alpha: float | None
    rslora: bool
    dropout: float
    pool_size: int | None
    calibration: str | Path | None
    calibration_tokens: int | None
    sequence_length: int | None
    refine: int | None
    target_modules: Sequence[str] | None
    exclude_modules: Sequence[str]
    task: str | None
    num_labels: int | None
    max_shard_size: str
    revision: str | None
    trust_remote_code: bool
    token: str | None
    device: str | torch.device | None
    workers: int | None
