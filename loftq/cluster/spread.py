"""Spreads the work of a run over a cluster: solving, measuring widths, and refining on one of its GPUs."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loftq.artifacts.staging import Staging
from loftq.cluster.jobs import Job, SharedFolder
from loftq.cluster.nodes import Need
from loftq.cluster.rates import Rates
from loftq.cluster.sent import Array, inputs_of, write_pieces
from loftq.cluster.tasks import Slots, run_tasks
from loftq.cluster.work import NeedsInputs, Solved, measure_task, refine_task, solve_task
from loftq.formats.shard_writer import ShardWriter
from loftq.planning.plan import Layer, Plan
from loftq.planning.run import Run
from loftq.solving.allocate import MeasureErrors
from loftq.solving.distill import RefineFolder
from loftq.solving.layers import Finished, RunJobs

NewJob = Callable[[SharedFolder], Job]


def solving(ray: Any, new_job: NewJob, plan: Plan, staging: Staging, needs: Mapping[str, Need], run: Run) -> RunJobs:
    """What runs the jobs of tensors on a cluster. `needs` are those of each job."""

    def run_elsewhere(names: Sequence[str], writer: ShardWriter, finished: Finished) -> None:
        layers = {layer.tensor: layer for layer in plan.layers}
        rates = Rates({name: layer.weights for name, layer in layers.items()})

        def done(name: str, result: Solved) -> None:
            write_pieces(writer, result.pieces)
            writer.include(result.record["written"])
            finished(name, result.record, rates.add(name, result.node, result.worker, result.seconds))

        with _shared(staging) as output:
            _Spread(ray, solve_task, new_job(output), needs, layers, run.tasks).run(names, done)

    return run_elsewhere


def measuring(ray: Any, job: Job, plan: Plan, needs: Mapping[str, Need], run: Run) -> MeasureErrors:
    """What measures the errors of modules at each width on a cluster. `needs` are those of each module."""

    def measure_elsewhere(modules: Sequence[str], measured: Callable[[str, list[float]], None]) -> None:
        layers = {layer.module: layer for layer in plan.linears}
        _Spread(ray, measure_task, job, needs, layers, run.tasks).run(modules, measured)

    return measure_elsewhere


def refining(ray: Any, new_job: NewJob, staging: Staging, need: Need) -> RefineFolder:
    """What refines an adapter in one worker of a cluster."""

    def refine_elsewhere(folder: Path, start: Path) -> dict[str, Any]:
        record: dict[str, Any] = {}
        with _shared(staging) as output:
            job = ray.put(new_job(output))
            remote = ray.remote(max_retries=0, **need.options())(refine_task)

            def submit(_: str) -> Any:
                return remote.remote(job, folder.resolve(), start.resolve())

            run_tasks(ray, submit, ["the adapter"], lambda _, found: record.update(found), Slots(ray, need, 1))
        return record

    return refine_elsewhere


class _Spread:
    """Runs a task for each of several names. Once a worker does not see the statistics, they are sent along.

    `layers` are the layers of those names that stand for one.
    """

    def __init__(
        self,
        ray: Any,
        task: Callable[..., Any],
        job: Job,
        needs: Mapping[str, Need],
        layers: Mapping[str, Layer],
        most: int | None,
    ) -> None:
        self._ray, self._needs, self._layers, self._most = ray, needs, layers, most
        self._statistics, self._job = job.statistics, ray.put(job)
        self._remote = ray.remote(max_retries=0, scheduling_strategy="SPREAD")(task)
        self._sends = False

    def run(self, names: Sequence[str], done: Callable[[str, Any], None]) -> None:
        """Run the tasks. `done` gets the result of each."""
        again: list[str] = []

        def keep(name: str, result: Any) -> None:
            if isinstance(result, NeedsInputs):
                self._sends = True
                again.append(name)
            else:
                done(name, result)

        while names:
            largest = Need.largest([self._needs[name] for name in names])
            run_tasks(self._ray, self._submit, names, keep, Slots(self._ray, largest, self._most))
            names, again = again, []

    def _submit(self, name: str) -> Any:
        inputs: dict[str, Array] | None = None if name in self._layers else {}
        if self._sends and self._statistics is not None and name in self._layers:
            inputs = inputs_of(self._statistics, self._layers[name])
        return self._remote.options(**self._needs[name].options()).remote(self._job, name, inputs)


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
