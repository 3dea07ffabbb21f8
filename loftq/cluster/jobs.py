"""What runs in the workers of a cluster: a job is opened once in a process, and then its tasks run in it.

A worker makes the plan again from the same source and settings, and compares the source with that of the driver, the
process that started the run. If it sees the partial folder of the output, it writes its tensors there; otherwise it
returns them, and the driver writes them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from loftq.calibration.statistics import RECORD, Statistics, headers_digest, open_statistics
from loftq.cluster.tasks import Failure, failure_of
from loftq.display import one_line
from loftq.errors import LoftQError, OutputError, SourceError
from loftq.formats.disk import explain_os_errors
from loftq.formats.scan import hash_of
from loftq.formats.shard_writer import ShardWriter
from loftq.hub.source import find_source
from loftq.models.devices import explain_full_memory
from loftq.planning.plan import Layer, Plan
from loftq.planning.planner import make_plan
from loftq.planning.recipe import Recipe
from loftq.solving.allocate import errors_of_widths
from loftq.solving.distill import refine_folder
from loftq.solving.layers import make_tensors, one_thread_each

_FULL = "a worker of the cluster has too little memory: use fewer --workers, or nodes with more memory"


@dataclass(frozen=True)
class SharedFolder:
    """The partial folder of the output, and a file in it whose text tells a worker that it sees the same folder."""

    folder: str
    probe: str
    text: str
    kept: tuple[str, ...]  # files that are complete

    def is_seen(self) -> bool:
        """Whether this process sees the folder."""
        try:
            return (Path(self.folder) / self.probe).read_text(encoding="utf-8") == self.text
        except OSError:
            return False


@dataclass(frozen=True)
class Job:
    """What a worker must know to do the tasks of a run.

    `model` and `revision` are those of `find_source`; `headers` and `sizes` are a hash of the names and shapes of the
    source's tensors, and the sizes of its files. `widths` are the bits of each layer, where they were measured.
    `statistics` are a folder and the hash of its record.
    """

    key: str
    model: str | None
    revision: str | None
    token: str | None
    trust_remote_code: bool
    headers: str
    sizes: Mapping[str, int]
    recipe: Recipe
    widths: Mapping[str, int] | None
    device: str
    output: SharedFolder | None = None
    statistics: tuple[str, str] | None = None


@dataclass(frozen=True)
class Array:
    """A tensor that can be sent without a copy: its bytes as an array, its dtype and its shape."""

    data: np.ndarray[Any, np.dtype[np.uint8]]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Array:
        """The bytes of a tensor."""
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        return cls(flat.numpy(), tensor.dtype, tuple(tensor.shape))

    def tensor(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        return torch.from_numpy(self.data.copy()).view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Solved:
    """The result of a task: its record, and the tensors if the worker does not see the output. `node` is an address."""

    record: dict[str, Any]
    arrays: dict[str, Array] | None
    node: str
    worker: int
    seconds: float


@dataclass(frozen=True)
class NeedsMoment:
    """A worker does not see the statistics: the task must be given the moment of its layer."""


@dataclass
class _Opened:
    """A job in this process."""

    job: Job
    plan: Plan
    device: torch.device
    writer: ShardWriter | None
    statistics: Statistics | None


class _GivenMoment:
    """The moment of one layer, which came with the task. The driver checks the hash of the weight."""

    def __init__(self, moment: torch.Tensor | None) -> None:
        self._moment = moment

    def check_weight(self, layer: Layer, digest: str) -> None:
        """Nothing is known here about the weights of the calibration."""

    def moment(self, module: str) -> torch.Tensor | None:  # noqa: ARG002
        """The moment that came with the task."""
        return self._moment


_opened: _Opened | None = None


def open_job(job: Job) -> _Opened:
    """The job in this process: what an earlier task opened, or else opened now. Raises LoftQError."""
    global _opened
    if _opened is None or _opened.job.key != job.key:
        if _opened is not None and _opened.writer is not None:
            _opened.writer.__exit__()
        plan = plan_here(job)
        device = torch.device(job.device)
        writer = None
        if job.output is not None and job.output.is_seen():
            shards = [*plan.backbone, plan.adapter]
            writer = ShardWriter(Path(job.output.folder), shards, job.output.kept, join=True).__enter__()
        _opened = _Opened(job, plan, device, writer, _statistics_here(job, plan))
    return _opened


def plan_here(job: Job) -> Plan:
    """The plan of a job, made from the source as this node sees it. Raises SourceError if it is not the driver's."""
    try:
        source = find_source(job.model, revision=job.revision, token=job.token, trust_remote_code=job.trust_remote_code)
        plan = make_plan(source, job.recipe, trust_remote_code=job.trust_remote_code, widths=job.widths)
    except LoftQError as error:
        raise SourceError(f"node {address_here()} cannot read the model: {error}") from error
    if headers_digest(plan.source.checkpoint) != job.headers or sizes_of(plan) != job.sizes:
        raise SourceError(
            f"node {address_here()} has other files of {plan.source.name} than the node that started the run: copy the "
            "same files there, or name a folder that all nodes see"
        )
    return plan


def sizes_of(plan: Plan) -> dict[str, int]:
    """The size of each file of a plan's source."""
    return {name: state[0] for name, state in plan.source.file_states().items()}


def address_here() -> str:
    """The address of this node."""
    import ray

    return str(ray.util.get_node_ip_address())


def _statistics_here(job: Job, plan: Plan) -> Statistics | None:
    """The statistics of a job, if this process sees them."""
    if job.statistics is None:
        return None
    folder, digest = Path(job.statistics[0]), job.statistics[1]
    if not (folder / RECORD).is_file() or hash_of(folder / RECORD) != digest:
        return None
    return open_statistics(folder, plan)


def solve_task(job: Job, name: str, moment: Array | None, given: bool) -> Solved | NeedsMoment | Failure:
    """Make the tensors of a job's task, and write them if this process sees the output.

    If it does not see the statistics, the `moment` must be `given`, which is None for a layer that was never reached.
    """
    started = time.perf_counter()
    try:
        with explain_full_memory(_FULL):
            opened = open_job(job)
            statistics = _statistics_for(opened, name, moment, given)
            if isinstance(statistics, NeedsMoment):
                return statistics
            with one_thread_each():
                made = make_tensors(opened.plan, name, statistics, opened.device)
        if opened.writer is None:
            arrays = {key: Array.of(tensor) for key, tensor in made.tensors.items()}
            return Solved(made.record, arrays, address_here(), os.getpid(), time.perf_counter() - started)
        with explain_os_errors(Path(cast(SharedFolder, job.output).folder).parent):
            written = {key: opened.writer.write(key, tensor) for key, tensor in made.tensors.items()}
            opened.writer.sync()  # before the driver records it
    except LoftQError as error:
        return failure_of(error)
    record = {**made.record, "written": written}
    return Solved(record, None, address_here(), os.getpid(), time.perf_counter() - started)


def measure_task(job: Job, module: str, moment: Array | None, given: bool) -> list[float] | NeedsMoment | Failure:
    """The error that each width leaves in a layer, as `allocate` compares them."""
    try:
        with explain_full_memory(_FULL), one_thread_each():
            opened = open_job(job)
            layer = next(layer for layer in opened.plan.layers if layer.module == module)
            statistics = _statistics_for(opened, layer.tensor, moment, given)
            if isinstance(statistics, NeedsMoment):
                return statistics
            return errors_of_widths(opened.plan, layer, statistics, opened.device)
    except LoftQError as error:
        return failure_of(error)


def refine_task(job: Job, folder: Path, start: Path) -> dict[str, Any] | Failure:
    """Refine the adapter in the partial folder, which this process must see, like the statistics."""
    try:
        with explain_full_memory(_FULL):
            opened = open_job(job)
            if opened.writer is None or opened.statistics is None:
                raise OutputError(
                    f"node {address_here()} refines the adapter, and does not see the output folder and statistics: "
                    "name folders that all nodes see with --output and --statistics, or use --refine 0"
                )
            return refine_folder(opened.plan, folder, start, opened.statistics, opened.device, quiet=True)
    except LoftQError as error:
        return failure_of(error)


def _statistics_for(
    opened: _Opened, tensor: str, moment: Array | None, given: bool
) -> Statistics | _GivenMoment | NeedsMoment | None:
    if opened.job.statistics is None or opened.statistics is not None:
        return opened.statistics
    if not any(layer.tensor == tensor for layer in opened.plan.layers):
        return None
    return _GivenMoment(None if moment is None else moment.tensor()) if given else NeedsMoment()


@dataclass(frozen=True)
class NodeReport:
    """What a node says before work begins: its versions, and the line that keeps it from the work, or an empty one."""

    versions: dict[str, str]
    refusal: str
    sees_output: bool


def report_node(job: Job) -> NodeReport:
    """The versions of this node, and whether it can read the source and sees the output folder."""
    refusal = ""
    try:
        plan_here(job)
    except (LoftQError, OSError) as error:
        refusal = one_line(error)
    return NodeReport(versions_here(), refusal, job.output is not None and job.output.is_seen())


def versions_here() -> dict[str, str]:
    """The versions that the bytes of a result depend on."""
    import platform
    from importlib.metadata import version

    return {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        **{name: version(name) for name in ("loftq", "torch", "transformers")},
    }
