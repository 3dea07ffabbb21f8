"""What every figure is printed with: the machine, the versions, the seed; and how times are taken.

With a GPU, what has been asked of it is waited for.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from loftq.display import columns

SEED = 0
_PACKAGES = ("loftq", "torch", "transformers", "peft", "bitsandbytes", "numba")


def describe(device: str | None = None) -> str:
    """One line on the machine, with its GPU unless `device` is another, and one on the versions."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (cpuinfo.read_text().splitlines() if cpuinfo.is_file() else [])
        if line.startswith("model name")
    ]
    cpu = names[0] if names else platform.processor() or platform.machine()
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    gpu = f"{torch.cuda.get_device_name()}; " if torch.cuda.is_available() and device != "cpu" else ""
    return f"{gpu}{cpu}, {os.cpu_count()} cores; Python {platform.python_version()}; seed {SEED}\n{versions}"


def seconds(work: Callable[[], object], runs: int = 5) -> float:
    """The median wall time of `runs` calls, after one that is not counted."""
    work()
    return median(once(work) for _ in range(runs))


def once(work: Callable[[], object]) -> float:
    """The wall time of one call."""
    settle()
    started = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - started


def settle() -> None:
    """Wait for what a GPU was asked."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows in aligned columns, the first one a heading."""
    lines = columns(rows).split("\n")
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
