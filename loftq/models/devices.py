"""The device on which work runs if the user names none, and the dtype in which it computes.

There are two choices of a device. `device_to_run` is for models that train, answer or are measured: any accelerator
that torch finds. `find_gpu` is for solving, which needs float64, so it leaves out Apple's GPUs; folders of packed
weights are loaded to the same GPU.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from loftq.errors import LoftQError, OptionError
from loftq.models.choices import COMPUTE_DTYPES


def find_gpu() -> torch.device | None:
    """The GPU that torch finds, with its index. None if there is none, or if it is Apple's, which has no float64."""
    accelerator = _accelerator()
    if accelerator is None or accelerator.type == "mps":
        return None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def is_here(device: torch.device) -> bool:
    """Whether this machine has the device of a run, whose cluster may have GPUs that it lacks."""
    return device.type == "cpu" or find_gpu() is not None


def device_to_run(cpu: bool | None) -> torch.device:
    """The accelerator that torch finds, or the CPU where it finds none or `cpu` is true.

    It has no index: of several GPUs, transformers gives each process its own.
    """
    return (None if cpu else _accelerator()) or torch.device("cpu")


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def device_name(device: torch.device) -> str:
    """A device in words, with the model of its processor where that is known."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.processor() or platform.machine()})" if device.type == "cpu" else str(device)


def free_memory(device: torch.device) -> int | None:
    """The free memory of a device in bytes; None if that is not known.

    For a CPU it is what the system can give to a program, within the limit of a container.
    """
    if device.type == "cpu":
        import psutil  # type: ignore[import-untyped]  # accelerate requires it

        return min([int(psutil.virtual_memory().available), *_left_in_container()])
    counter = getattr(torch.get_device_module(device), "mem_get_info", None)
    return None if counter is None else int(counter()[0])


def _left_in_container() -> list[int]:
    """The bytes that a control group leaves to its processes; empty without such a limit."""
    try:
        limit, used = (int(Path("/sys/fs/cgroup", f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no control groups, or no limit
        return []
    return [max(limit - used, 0)]


def compute_dtype(requested: str | None, device: torch.device) -> torch.dtype:
    """The requested dtype, or by default the best one for the device: bfloat16 where it computes in that.

    Raises OptionError for a dtype in which the device cannot compute.
    """
    from bitsandbytes.functional import has_avx512bf16

    if requested == "float16" and device.type == "cpu":
        raise OptionError("--dtype float16 is not supported on a CPU: use bfloat16 or float32")
    if requested == "bfloat16" and device.type == "cuda" and not _cuda_has_bfloat16():
        raise OptionError("--dtype bfloat16 is not supported by this GPU: use float16 or float32")
    if requested is not None:
        named: torch.dtype = getattr(torch, requested)
        return named
    if device.type == "cuda":
        return torch.bfloat16 if _cuda_has_bfloat16() else torch.float16
    return torch.bfloat16 if device.type == "cpu" and has_avx512bf16() else torch.float32


def has_grouped_products(tensor: torch.Tensor) -> bool:
    """Whether torch's grouped matrix product computes with a tensor's device and dtype: since torch 2.10."""
    if not hasattr(torch.nn.functional, "grouped_mm") or str(tensor.dtype).removeprefix("torch.") not in COMPUTE_DTYPES:
        return False
    if tensor.device.type == "cuda":
        return torch.cuda.get_device_capability(tensor.device) >= (8, 0)
    return tensor.device.type == "cpu"


def _cuda_has_bfloat16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


_FULL = r"can't allocate memory|not enough memory|Cannot allocate memory"


@contextmanager
def explain_full_memory(advice: str) -> Iterator[None]:
    """Turn an error that says that memory is full into a LoftQError with advice on how to need less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_full_memory(error):
            raise
        raise LoftQError(f"out of memory: {advice}") from error


def is_full_memory(error: BaseException) -> bool:
    """Whether an error says that memory is full."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and re.search(_FULL, str(error)) is not None
