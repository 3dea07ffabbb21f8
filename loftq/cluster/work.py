"""The tasks of a job, as they run in the workers of a cluster. A LoftQError is returned as a `Failure`.

A worker that sees the partial folder of the output writes its tensors there; otherwise it returns their bytes, and the
driver writes them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.calibration.statistics import Statistics
from loftq.cluster.jobs import Job, OpenedJob, address_here, machine_here, open_job, plan_here
from loftq.cluster.sent import Array, Bytes, BytesWriter, SentStatistics
from loftq.cluster.tasks import Failure, failure_of
from loftq.display import one_line
from loftq.errors import LoftQError, OutputError
from loftq.formats.disk import explain_os_errors
from loftq.models.devices import explain_full_memory
from loftq.solving.allocate import errors_of_widths
from loftq.solving.distill import refine_folder
from loftq.solving.layers import one_thread_each, run_job

_FULL = "a worker of the cluster has too little memory: use fewer --workers, or nodes with more memory"


@dataclass(frozen=True)
class Solved:
    """The result of a task: its record, and the bytes to write, unless the worker has written them.

    `node` is the address of the worker's node, and `worker` the id of its process.
    """

    record: dict[str, Any]
    pieces: list[tuple[str, int, Bytes]]
    node: str
    worker: int
    seconds: float


@dataclass(frozen=True)
class NeedsInputs:
    """A worker does not see the statistics: the task must be given those of its layer."""


def run_batch(
    task: Callable[..., Any], job: Job, names: Sequence[str], inputs: Sequence[Mapping[str, Array] | None]
) -> list[Any] | Failure:
    """Run a task for each of several names, with its inputs. Returns the results, or the first failure."""
    results = []
    with one_thread_each():
        for name, given in zip(names, inputs, strict=True):
            result = task(job, name, given)
            if isinstance(result, Failure):
                return result
            results.append(result)
    return results


def solve_task(job: Job, name: str, inputs: Mapping[str, Array] | None) -> Solved | NeedsInputs | Failure:
    """Make the tensors of a job's task. `inputs` are the statistics of its layer, if they are sent along."""
    started = time.perf_counter()
    try:
        with explain_full_memory(_FULL):
            opened = open_job(job)
            statistics = _statistics_for(opened, inputs)
            if isinstance(statistics, NeedsInputs):
                return statistics
            writer = opened.new_writer()
            explained = explain_os_errors(Path(job.output.folder).parent) if job.output else nullcontext()
            with explained:
                record = run_job(opened.plan, name, statistics, writer, opened.device)
                if machine_here() != job.machine:
                    writer.sync()  # before the driver records it; on its own machine, the driver does it
    except LoftQError as error:
        return failure_of(error)
    pieces = writer.pieces if isinstance(writer, BytesWriter) else []
    return Solved(record, pieces, address_here(), os.getpid(), time.perf_counter() - started)


def measure_task(job: Job, module: str, inputs: Mapping[str, Array] | None) -> list[float] | NeedsInputs | Failure:
    """The error that each width leaves in a layer, as `allocate` compares them."""
    try:
        with explain_full_memory(_FULL):
            opened = open_job(job)
            layer = next(layer for layer in opened.plan.layers if layer.module == module)
            statistics = _statistics_for(opened, inputs)
            if isinstance(statistics, NeedsInputs):
                return statistics
            return errors_of_widths(opened.plan, layer, statistics, opened.device)
    except LoftQError as error:
        return failure_of(error)


def refine_task(job: Job, folder: Path, start: Path) -> dict[str, Any] | Failure:
    """Refine the adapter in the partial folder, which this process must see, like the statistics."""
    try:
        with explain_full_memory(_FULL):
            opened = open_job(job)
            if not opened.sees_output or opened.statistics is None:
                raise OutputError(
                    f"node {address_here()} refines the adapter, and does not see the output folder and statistics: "
                    "name folders that all nodes see with --output and --statistics, or use --refine 0"
                )
            return refine_folder(opened.plan, folder, start, opened.statistics, opened.device, quiet=True)
    except LoftQError as error:
        return failure_of(error)


def check_task(job: Job) -> str:
    """The line that keeps this node from the work, because it does not read the same source, or an empty one."""
    try:
        plan_here(job)
    except LoftQError as error:
        return one_line(error)
    return ""


def _statistics_for(opened: OpenedJob, inputs: Mapping[str, Array] | None) -> Statistics | NeedsInputs | None:
    sent = opened.job.statistics
    if sent is None or opened.statistics is not None:
        return opened.statistics
    return NeedsInputs() if inputs is None else SentStatistics(sent.folder, sent.record, sent.sizes, inputs)
