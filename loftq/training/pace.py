"""Estimates the time of a training from the operations of its steps and from what a matrix product reaches just now.

A frozen weight takes part in two products for each token, one forward and one backward, each of two operations for a
value of the weight; gradient checkpointing repeats the first. The rest of a step (dequantizing, attention, norms, the
optimizer) is counted by the part of a matrix product's rate that training reaches.
"""

from __future__ import annotations

import time
from typing import Any

import torch

_SHARE = 1 / 3  # the part of a matrix product's rate that a training reaches; `benchmarks/pace.py` compares the two
_ROWS = 512
_SECONDS = 0.2  # in which products are measured


def operations(model: Any, tokens: float, *, checkpointing: bool) -> float:
    """The operations of a training step on so many tokens."""
    return tokens * _active_weights(model) * (6 if checkpointing else 4)


def reached_rate(width: int, dtype: torch.dtype, device: torch.device) -> float:
    """The operations per second that a training will reach about, from products that are measured now."""
    left = torch.ones(_ROWS, width, dtype=dtype, device=device)
    right = torch.ones(width, width, dtype=dtype, device=device)
    left @ right  # the first product also sets up the library
    _wait(device)
    started, count = time.perf_counter(), 0
    while not count or time.perf_counter() - started < _SECONDS:
        left @ right
        _wait(device)
        count += 1
    return _SHARE * count * 2 * _ROWS * width**2 / (time.perf_counter() - started)


def _active_weights(model: Any) -> float:
    """The number of values in matrices that a token is multiplied by: not its embedding, and few of many experts."""
    config = model.config.get_text_config()
    every = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    chosen = getattr(config, "num_experts_per_tok", None) or every
    part = chosen / every if every else 1.0
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    total = 0.0
    for parameter in model.parameters():
        if parameter.dim() > 1:
            total += parameter.numel() * (part if parameter.dim() == 3 else 1.0)
    tied = head is not None and head.weight is embedding.weight
    return total if tied else total - embedding.weight.numel()


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def duration(seconds: float) -> str:
    """A time for a person."""
    if seconds < 1:
        return "less than a second"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
