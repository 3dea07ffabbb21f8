"""The settings of a run that do not change its result: device, workers, permissions and others."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from loftq.errors import OptionError
from loftq.models.devices import find_gpu
from loftq.planning.settings import RunSettings


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run settings of which none is left open. They are passed as a single value to each part of the work.

    On a `cluster`, at most `tasks` run at the same time; None is no limit.
    """

    device: torch.device
    workers: int
    resume: bool = False
    overwrite: bool = False
    quiet: bool = False
    token: str | None = None
    trust_remote_code: bool = False
    statistics: str | None = None
    cluster: str | None = None
    tasks: int | None = None


def start(settings: RunSettings) -> Run:
    """Choose a value for each setting that is left open.

    Raises OptionError for a device that is not available, and for settings that contradict each other.
    """
    check_resume(settings.resume, settings.overwrite)
    if settings.private and settings.push is None:
        raise OptionError("--private: applies only to a repository: name one with --push")
    device = _device(settings.device) if settings.cluster is None else _kind_of_device(settings.device)
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
        cluster=settings.cluster,
        tasks=settings.workers if settings.cluster is not None else None,
    )


def check_resume(resume: bool, overwrite: bool) -> None:
    """Raise OptionError if both options are set: a run cannot be both finished and started again."""
    if resume and overwrite:
        raise OptionError(
            "--resume and --overwrite exclude each other: use --resume to finish the run, or --overwrite to start again"
        )


def _device(name: str | None) -> torch.device:
    try:
        device = find_gpu() or torch.device("cpu") if name is None else torch.device(name)
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(
            f"--device {name}: not available here ({reason}): use --device cpu, which is always available"
        ) from error
    return device


def _kind_of_device(name: str | None) -> torch.device:
    """The kind of device that each task of a cluster gets. Until the cluster is known, it is the CPU by default."""
    kind, _, index = (name or "cpu").partition(":")
    if kind not in ("cpu", "cuda"):
        raise OptionError(f"--device {name}: expected cpu or cuda with --cluster")
    if index:
        raise OptionError(f"--device {name}: each task of a cluster gets a GPU of its own: use --device {kind}")
    return torch.device(kind)
