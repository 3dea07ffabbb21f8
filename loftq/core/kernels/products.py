"""Products of float32 matrices on CPUs: by the library that is faster for the processor.

torch multiplies with MKL, which computes with AVX2 on AMD's processors. oneDNN, which is part of torch too, has AVX-512
kernels for them. They are as exact, and about twice as fast.

torch hands float32 products to oneDNN only if oneDNN may round their inputs to bfloat16. Whether it does so depends on
the processor: on those with AMX it does. So a product is compared with the exact one first.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch

_EXACT = 2e-6  # relative error of a product in float32; one of inputs in bfloat16 has 2e-3
_CPUINFO = Path("/proc/cpuinfo")
_lock = Lock()
_inside: list[str] = []  # the setting as it was before, and an entry for each thread that has entered


@contextmanager
def fast_products() -> Iterator[None]:
    """Let oneDNN compute the float32 products of this process where it is faster than MKL, and as exact.

    Several threads may enter; the setting is restored when the last one leaves.
    """
    setting = _setting()
    if setting is None or not _worth_it():
        yield
        return
    with _lock:
        if not _inside:
            _inside.append(setting.fp32_precision)
            setting.fp32_precision = "bf16"
        _inside.append("")
    try:
        yield
    finally:
        with _lock:
            _inside.pop()
            if len(_inside) == 1:
                setting.fp32_precision = _inside.pop()


def are_fast() -> bool:
    """Whether `fast_products` has an effect now."""
    setting = _setting()
    return setting is not None and setting.fp32_precision == "bf16" and _worth_it()


def _setting() -> Any:
    """The setting of torch that decides; None in versions that lack it."""
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    return setting if hasattr(setting, "fp32_precision") else None


@cache
def _worth_it() -> bool:
    """Whether the processor is one that MKL slows down, and oneDNN's products are exact on it."""
    if "AMD" not in _vendor() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return _error() < _EXACT


def _vendor() -> str:
    """What the system says of the maker of the processor."""
    return _CPUINFO.read_text(errors="replace")[:400] if _CPUINFO.is_file() else platform.processor()


def _error() -> float:
    """The relative error of a product by oneDNN."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=generator)
    exact = a.double() @ b.double()
    setting = _setting()
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        product = a @ b
    finally:
        setting.fp32_precision = before
    return float((product - exact).norm() / exact.norm())
