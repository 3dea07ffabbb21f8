"""The device that work goes to where none is named.

The two choices differ on purpose. `device_to_run` is for models that train, answer or are measured: any accelerator
that torch finds. `find_gpu` is for solving, which needs float64, and so leaves out Apple's GPUs, which lack it; folders
of packed weights load to the same GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from loftq.errors import LoftQError, OptionError


def find_gpu() -> torch.device | None:
    """The GPU, with its index, that computes in float64; None where torch finds none."""
    accelerator = _accelerator()
    if accelerator is None or accelerator.type == "mps":
        return None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def device_to_run(cpu: bool | None) -> torch.device:
    """The accelerator that torch finds, or the CPU where it finds none or `cpu` is true.

    It has no index: of several GPUs, transformers gives each process its own.
    """
    return (None if cpu else _accelerator()) or torch.device("cpu")


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def compute_dtype(asked: str | None, device: torch.device) -> torch.dtype:
    """The one asked for, or bfloat16 where the device computes in it. Raises OptionError where it cannot train."""
    from bitsandbytes.functional import has_avx512bf16

    if asked == "float16" and device.type == "cpu":
        raise OptionError("--dtype float16: not on a CPU: use bfloat16 or float32")
    if asked == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise OptionError("--dtype bfloat16: this GPU does not compute in it: use float16 or float32")
    if asked is not None:
        return COMPUTE_DTYPES[asked]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and has_avx512bf16() else torch.float32


COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


_FULL = r"can't allocate memory|not enough memory|Cannot allocate memory"


@contextmanager
def explain_full_memory(cure: str) -> Iterator[None]:
    """Turn what says that memory is full into a LoftQError with what lowers the need."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not re.search(_FULL, str(error)):
            raise
        raise LoftQError(f"out of memory: {cure}") from error
