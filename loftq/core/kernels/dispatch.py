"""The choice of an implementation by device: compiled loops on the CPU, Triton kernels on a GPU, torch elsewhere.

Without a kernel, torch's own operators process a part of the weight at a time, in whole blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

import torch

CHUNK = 1 << 22  # values that are processed at a time, so that temporaries stay small compared with the weight
TRITON = ("cuda", "xpu")  # devices for which torch installs Triton
HAS_TRITON = find_spec("triton") is not None


def on_cpu(tensor: torch.Tensor) -> bool:
    """Whether the compiled loops can process a tensor."""
    return tensor.device.type == "cpu"


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels can process a tensor."""
    return HAS_TRITON and tensor.device.type in TRITON


def step(block: int) -> int:
    """Number of values that are processed at a time: whole blocks."""
    return max(CHUNK // block, 1) * block


def subtract(weight: torch.Tensor, rounded: Iterable[torch.Tensor], block: int, out: torch.Tensor) -> float:
    """Compute `out = weight − rounded` and return its squared norm. `rounded` are parts of `step(block)` values."""
    total = 0.0
    size = step(block)
    parts = zip(torch.split(weight.view(-1), size), torch.split(out.view(-1), size), rounded, strict=True)
    for values, target, part in parts:
        torch.sub(values, part.view(-1), out=target)
        total += float(target.double().square().sum())
    return total
