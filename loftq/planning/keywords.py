"""The keywords of `loftq.quantize`, for editors and type checkers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import torch


class QuantizeKeywords(TypedDict, total=False):
    """The settings of `QuantizeSettings` and `RunSettings`."""

    bits: float
    quant_type: str | None
    expert_bits: float | None
    allocation: str | None
    method: str | None
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
    seed: int
    adapter: str
    rank: int
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
    backbone: str | Path | None
    task: str | None
    num_labels: int | None
    max_shard_size: str
    revision: str | None
    source: str | Path | None
    trust_remote_code: bool
    save_dir: str | Path
    output: str | Path | None
    statistics: str | Path | None
    resume: bool
    overwrite: bool
    token: str | None
    push: str | None
    private: bool
    device: str | torch.device | None
    workers: int | None
    cluster: str | None
    dry_run: bool
    quiet: bool
