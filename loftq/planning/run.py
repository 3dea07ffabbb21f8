"""How a run is carried out: on which device, by how many workers, with which rights. It does not change the result."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from loftq.errors import OptionError
from loftq.models.devices import find_gpu
from loftq.planning.settings import RunSettings


@dataclass(frozen=True, kw_only=True)
class Run:
    """The settings of a run with nothing left open; they travel together from the verb to each part of the work."""

    device: torch.device
    workers: int
    resume: bool = False
    overwrite: bool = False
    quiet: bool = False
    token: str | None = None
    trust_remote_code: bool = False
    statistics: str | None = None


def start(settings: RunSettings) -> Run:
    """Decide what settings leave open. Raises OptionError for a device that is not there, or a contradiction."""
    check_resume(settings.resume, settings.overwrite)
    if settings.private and settings.push is None:
        raise OptionError("--private: is for a repository: name one with --push")
    device = _device(settings.device)
    usual = min(os.cpu_count() or 1, 8) if device.type == "cpu" else 1
    return Run(
        device=device,
        workers=settings.workers or usual,
        resume=settings.resume,
        overwrite=settings.overwrite,
        quiet=settings.quiet,
        token=settings.token,
        trust_remote_code=settings.trust_remote_code,
        statistics=settings.statistics,
    )


def check_resume(resume: bool, overwrite: bool) -> None:
    """Raise OptionError where a run is to be both finished and started again."""
    if resume and overwrite:
        raise OptionError("--resume and --overwrite exclude each other: finish the run, or start again")


def _device(name: str | None) -> torch.device:
    try:
        device = find_gpu() or torch.device("cpu") if name is None else torch.device(name)
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"--device {name}: not available here ({reason}); cpu always is") from error
    return device
