"""A run as its workers know it. A job is opened once in a process, and then its tasks run there.

A worker makes the plan again from the same source and settings, and compares the source with that of the driver, the
process that started the run.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loftq.calibration.statistics import Statistics, headers_digest, open_statistics, read_record
from loftq.cluster.sent import BytesWriter
from loftq.display import one_line
from loftq.errors import LoftQError, OptionError, SourceError
from loftq.formats.shard_writer import ShardWriter
from loftq.hub.source import find_source
from loftq.planning.plan import Plan
from loftq.planning.planner import make_plan
from loftq.planning.recipe import Recipe

_PACKAGES = ("loftq", "torch", "transformers")  # whose versions change the bytes of a result


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
    `versions` are those of the driver, and `machine` is the one on which it runs.
    """

    key: str
    model: str | None
    revision: str | None
    token: str | None
    trust_remote_code: bool
    headers: str
    sizes: Mapping[str, int]
    recipe: Recipe
    widths: Mapping[str, float] | None
    device: str
    versions: Mapping[str, str | None]
    machine: str
    output: SharedFolder | None = None
    statistics: Statistics | None = None


@dataclass
class OpenedJob:
    """A job in this process. `statistics` are None also if this process does not see them."""

    job: Job
    plan: Plan
    device: torch.device
    writer: ShardWriter | None
    statistics: Statistics | None

    @property
    def sees_output(self) -> bool:
        """Whether tensors are written here. Otherwise the driver writes them."""
        return self.writer is not None

    def new_writer(self) -> ShardWriter:
        """What writes the tensors of one task."""
        return self.writer or BytesWriter([*self.plan.backbone, self.plan.adapter])


_opened: OpenedJob | None = None


def open_job(job: Job) -> OpenedJob:
    """The job in this process: what an earlier task opened, or else opened now. Raises LoftQError."""
    global _opened
    if _opened is None or _opened.job.key != job.key:
        if _opened is not None and _opened.writer is not None:
            _opened.writer.__exit__()
        plan, device, writer = plan_here(job), torch.device(job.device), None
        if job.output is not None and job.output.is_seen():
            shards = [*plan.backbone, plan.adapter]
            writer = ShardWriter(Path(job.output.folder), shards, job.output.kept, join=True).__enter__()
        _opened = OpenedJob(job, plan, device, writer, _statistics_here(job, plan))
    return _opened


def plan_here(job: Job) -> Plan:
    """The plan of a job, made from the source as this node sees it.

    Raises SourceError if the source is not the driver's, and OptionError for other versions of packages.
    """
    check_versions(job.versions, version_probe()(), address_here())
    try:
        source = find_source(job.model, revision=job.revision, token=job.token, trust_remote_code=job.trust_remote_code)
        plan = make_plan(source, job.recipe, trust_remote_code=job.trust_remote_code, widths=job.widths)
    except (LoftQError, OSError) as error:
        raise SourceError(f"node {address_here()} cannot read the model: {one_line(error)}") from error
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


def node_here() -> str:
    """The id that Ray has given this node."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def machine_here() -> str:
    """What tells this machine from others. Containers of one machine share it, like the files that it has cached."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text() if boot.is_file() else platform.node()


def version_probe() -> Callable[..., dict[str, str | None]]:
    """A function that returns the versions of a node. It is sent by its code, so that it runs without loftq there."""
    packages = _PACKAGES

    def versions(*_: Any) -> dict[str, str | None]:
        import platform
        from importlib.metadata import PackageNotFoundError, version

        found: dict[str, str | None] = {"Python": ".".join(platform.python_version_tuple()[:2])}
        for name in packages:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = None
        return found

    return versions


def check_versions(expected: Mapping[str, str | None], found: Mapping[str, str | None], address: str) -> None:
    """Raise OptionError if a node has other versions than the driver: its results might differ."""
    for name, wanted in expected.items():
        if found.get(name) != wanted:
            has = f"has {name} {found[name]}" if found.get(name) else f"has no {name}"
            raise OptionError(f"node {address} {has}, this one has {wanted}: install {name} {wanted} on all nodes")


def _statistics_here(job: Job, plan: Plan) -> Statistics | None:
    """The statistics of a job, if this process sees them."""
    if job.statistics is None:
        return None
    try:
        if read_record(job.statistics.folder) != job.statistics.record:
            return None
        return open_statistics(job.statistics.folder, plan)
    except (LoftQError, OSError):
        return None
