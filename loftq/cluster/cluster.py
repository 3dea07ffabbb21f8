"""A cluster as the place where a run's layers are calibrated and solved."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from loftq.artifacts.staging import Staging
from loftq.calibration.statistics import RECORD, Statistics, headers_digest
from loftq.cluster.calibrating import Calibrating
from loftq.cluster.connection import connected
from loftq.cluster.estimate import Sample, estimate, rates_task
from loftq.cluster.jobs import (
    Array,
    Job,
    NeedsMoment,
    SharedFolder,
    Solved,
    measure_task,
    refine_task,
    report_node,
    sizes_of,
    solve_task,
    versions_here,
)
from loftq.cluster.nodes import PROCESS_BYTES, Need, Node, check_need, nodes_of
from loftq.cluster.rates import Rates
from loftq.cluster.tasks import Failure, Slots, explain, run_tasks
from loftq.display import one_line
from loftq.errors import LoftQError, OptionError
from loftq.formats.scan import hash_of
from loftq.formats.shard_writer import ShardWriter
from loftq.models.devices import find_gpu
from loftq.planning.plan import Plan
from loftq.planning.run import Run
from loftq.solving.distill import Elsewhere as Distiller
from loftq.solving.layers import Finished
from loftq.solving.memory import calibrating_bytes, solving_bytes


@dataclass(frozen=True)
class Cluster:
    """A connection to Ray, the model that its nodes read, and the settings of the run.

    `model` is the name from which each node finds the source: a folder, an id on the Hub, or None for the default.
    """

    ray: Any = field(repr=False)
    model: str | None
    run: Run

    @property
    def nodes(self) -> list[Node]:
        """The nodes that are alive."""
        return nodes_of(self.ray)

    def job(self, plan: Plan, statistics: Statistics | None = None, output: SharedFolder | None = None) -> Job:
        """What workers must know of a plan."""
        record = None
        if statistics is not None:
            folder = statistics.folder.resolve()
            record = str(folder), hash_of(folder / RECORD)
        measured = plan.recipe.allocation == "auto"
        return Job(
            key=secrets.token_hex(8),
            model=self.model,
            revision=plan.source.revision,
            token=self.run.token,
            trust_remote_code=self.run.trust_remote_code,
            headers=headers_digest(plan.source.checkpoint),
            sizes=sizes_of(plan),
            recipe=plan.recipe,
            widths={layer.module: layer.bits for layer in plan.layers} if measured else None,
            device=self.run.device.type,
            output=output,
            statistics=record,
        )

    def need(self, nbytes: int) -> Need:
        """What a task asks for that solves with so many bytes."""
        return Need(1, 0 if self.run.device.type == "cpu" else 1, nbytes + PROCESS_BYTES)

    def largest_need(self, plan: Plan) -> Need:
        """What the task of the largest layer asks for."""
        return self.need(max(solving_bytes(plan, layer) for layer in plan.layers))

    def check(self, plan: Plan) -> None:
        """Raise LoftQError unless all nodes can do the work: they need its versions, its source, memory and GPUs."""
        nodes, expected = self.nodes, versions_here()
        check_need(nodes, self.largest_need(plan), "the largest layer")
        for node, found in self._ask(report_node, nodes, Need(0, 0, 0), self.job(plan)):
            for name, version in expected.items():
                if found.versions.get(name) != version:
                    raise OptionError(
                        f"node {node.address} has {name} {found.versions.get(name)}, this one has {version}: install "
                        "the same version on all nodes"
                    )
            if found.refusal:
                raise OptionError(found.refusal)

    def estimate(self, plan: Plan) -> dict[str, Any]:
        """The nodes, and the seconds that each part of a run is expected to take. A worker of each node is measured."""
        nodes, need = self.nodes, self.largest_need(plan)
        check_need(nodes, need, "the largest layer")
        rates = {}
        for node, found in self._ask(rates_task, nodes, Need(1, need.gpus, 0), Sample.of(plan, self.run.device)):
            if isinstance(found, Failure):
                raise found.error()
            rates[node.id] = found
        return estimate(plan, [node for node in nodes if node.id in rates], need, self.run.most, rates)

    def _ask(
        self, task: Callable[[Any], Any], nodes: Sequence[Node], need: Need, argument: Any
    ) -> Iterator[tuple[Node, Any]]:
        """Run a task on each node, and return what those answer that are still alive."""
        shared = self.ray.put(argument)
        pinned = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        remote = self.ray.remote(max_retries=3, **need.options())(task)
        answers = [
            (node, remote.options(scheduling_strategy=pinned(node.id, soft=False)).remote(shared)) for node in nodes
        ]
        for node, answer in answers:
            try:
                yield node, self.ray.get(answer)
            except self.ray.exceptions.RayError as error:
                explain(self.ray, f"node {node.address}", error)  # if it died, its tasks run elsewhere

    def calibrate(self, plan: Plan) -> Calibrating:
        """What runs the model of `gather` on the cluster."""
        nodes, device = self.nodes, self.run.device
        # with as many threads as this process would use: the last bits of products depend on it
        threads = min(torch.get_num_threads(), max(node.cores for node in nodes)) if device.type == "cpu" else 1
        nbytes = calibrating_bytes(plan, device)
        need = Need(threads, 0 if device.type == "cpu" else 1, nbytes + PROCESS_BYTES)
        check_need(nodes, need, "calibrating")
        return Calibrating(self.ray, self.job(plan), need, threads, self.run.most)

    def solve(self, plan: Plan, staging: Staging, statistics: Statistics | None) -> Callable[..., None]:
        """A function that runs jobs of `solve_all` on the cluster."""

        def elsewhere(names: Sequence[str], writer: ShardWriter, finished: Finished) -> None:
            layers = {layer.tensor: layer for layer in plan.layers}
            rates = Rates({name: layer.weights for name, layer in layers.items()})

            def done(name: str, result: Solved) -> None:
                record = result.record
                if result.arrays is not None:
                    written = {key: writer.write(key, array.tensor()) for key, array in result.arrays.items()}
                    record = {**record, "written": written}
                if statistics is not None and name in layers:
                    statistics.check_weight(layers[name], record["sha256"])
                finished(name, record, rates.add(name, result.node, result.worker, result.seconds))

            needs = {name: self.need(_bytes_of(plan, name)) for name in names}
            with _shared(staging) as output:
                job = self.job(plan, statistics, output)
                modules = {name: layer.module for name, layer in layers.items()}
                self._run(solve_task, job, names, done, needs, modules, statistics)

        return elsewhere

    def measure(self, plan: Plan, statistics: Statistics | None) -> Callable[..., None]:
        """A function that measures layers for `allocate` on the cluster."""

        def elsewhere(modules: Sequence[str], measured: Callable[[str, list[float]], None]) -> None:
            needs = {layer.module: self.need(solving_bytes(plan, layer)) for layer in plan.layers}
            job = replace(self.job(plan, statistics), widths=None)
            self._run(measure_task, job, modules, measured, needs, {name: name for name in modules}, statistics)

        return elsewhere

    def refine(self, plan: Plan, staging: Staging, statistics: Statistics) -> Distiller | None:
        """A function that refines on a GPU of the cluster; None if this machine has the device itself.

        One device refines: the steps are few and small, and gradients that are summed over several devices would make
        the bytes depend on their number.
        """
        if self.run.device.type == "cpu" or find_gpu() is not None:
            return None

        def elsewhere(folder: Path, start: Path) -> dict[str, Any]:
            record: dict[str, Any] = {}
            with _shared(staging) as output:
                job = self.ray.put(self.job(plan, statistics, output))
                remote = self.ray.remote(max_retries=0, **self.need(plan.backbone_bytes).options())(refine_task)

                def submit(_: str) -> Any:
                    return remote.remote(job, folder.resolve(), start.resolve())

                slots = Slots(self.ray, self.need(plan.backbone_bytes), 1)
                run_tasks(self.ray, submit, ["the adapter"], lambda _, found: record.update(found), slots)
            return record

        return elsewhere

    def _run(
        self,
        task: Callable[..., Any],
        job: Job,
        names: Sequence[str],
        done: Callable[[str, Any], None],
        needs: dict[str, Need],
        modules: dict[str, str],
        statistics: Statistics | None,
    ) -> None:
        """Run a task for each name. Once a worker has said that it does not see the moments, they are sent along."""
        if not names:
            return
        shared = self.ray.put(job)
        remote = self.ray.remote(max_retries=0, scheduling_strategy="SPREAD")(task)
        send = False
        again: list[str] = []

        def submit(name: str) -> Any:
            moment = statistics.moment(modules[name]) if send and statistics and name in modules else None
            array = None if moment is None else Array.of(moment)
            return remote.options(**needs[name].options()).remote(shared, name, array, send)

        def keep(name: str, result: Any) -> None:
            nonlocal send
            if isinstance(result, NeedsMoment):
                send = True
                again.append(name)
            else:
                done(name, result)

        largest = Need(
            max(need.cores for need in needs.values()),
            max(need.gpus for need in needs.values()),
            max(need.memory for need in needs.values()),
        )
        slots = Slots(self.ray, largest, self.run.most)
        run_tasks(self.ray, submit, names, keep, slots)
        if again:
            run_tasks(self.ray, submit, again.copy(), keep, slots)


def _bytes_of(plan: Plan, name: str) -> int:
    layer = next((layer for layer in plan.layers if layer.tensor == name), None)
    return solving_bytes(plan, layer) if layer else 2 * plan.source.checkpoint.tensors[name].nbytes


@contextmanager
def _shared(staging: Staging) -> Iterator[SharedFolder]:
    """The partial folder as workers look for it. A probe file in it says which folder it is."""
    probe, text = f"probe-{secrets.token_hex(4)}", secrets.token_hex(16)
    path = staging.folder.resolve() / probe
    path.write_text(text, encoding="utf-8")
    try:
        yield SharedFolder(str(path.parent), probe, text, tuple(staging.hashes))
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def opened(run: Run, model: str | None, *, any_device: bool) -> Iterator[Cluster]:
    """The cluster of a run. With `any_device` it computes on GPUs if a node has one, otherwise on the run's device.

    Raises OptionError if no cluster can be joined, or if it lacks what the run asks for.
    """
    with connected(str(run.cluster), run.most) as ray:
        has_gpu = any(node.gpus for node in nodes_of(ray))
        if any_device and has_gpu:
            run = replace(run, device=torch.device("cuda"))
        try:
            yield Cluster(ray, model, run)
        except ray.exceptions.RayError as error:
            explain(ray, "--cluster", error)
            raise LoftQError(f"the cluster failed ({one_line(error, 200)}): run again with --resume") from error
