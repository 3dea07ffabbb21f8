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
from loftq.cluster.work import NeedsInputs, Solved, measure_task, refine_task, run_batch, solve_task
from loftq.formats.shard_writer import ShardWriter
from loftq.planning.plan import Layer, Plan
from loftq.planning.run import Run
from loftq.solving.allocate import MeasureErrors
from loftq.solving.distill import RefineFolder
from loftq.solving.layers import Finished, RunJobs, sizes_of_jobs

LEAST_VALUES = 8_000_000  # of a task: Ray needs some milliseconds for each
NewJob = Callable[[SharedFolder], Job]


def solving(ray: Any, new_job: NewJob, plan: Plan, staging: Staging, needs: Mapping[str, Need], run: Run) -> RunJobs:
    """What runs the jobs of tensors on a cluster. `needs` are those of each job."""

    def run_elsewhere(names: Sequence[str], writer: ShardWriter, finished: Finished) -> None:
        layers = {layer.tensor: layer for layer in plan.layers}
        rates = Rates("w")

        def done(name: str, result: Solved) -> None:
            write_pieces(writer, result.pieces)
            writer.include(result.record["written"])
            rates.add(result.node, result.worker, layers[name].weights if name in layers else 0, result.seconds)
            finished(name, result.record, str(rates))

        with _shared(staging) as output:
            sizes = sizes_of_jobs(plan)
            _Spread(ray, solve_task, new_job(output), needs, layers, sizes, run.tasks).run(names, done)

    return run_elsewhere


def measuring(ray: Any, job: Job, plan: Plan, needs: Mapping[str, Need], run: Run) -> MeasureErrors:
    """What measures the errors of modules at each width on a cluster. `needs` are those of each module."""

    def measure_elsewhere(modules: Sequence[str], measured: Callable[[str, list[float]], None]) -> None:
        layers = {layer.module: layer for layer in plan.linears}
        sizes = {module: layer.weights for module, layer in layers.items()}
        _Spread(ray, measure_task, job, needs, layers, sizes, run.tasks).run(modules, measured)

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

    `layers` are the layers of those names that stand for one, and `sizes` the number of values of each name. Small ones
    go to a worker several at a time.
    """

    def __init__(
        self,
        ray: Any,
        task: Callable[..., Any],
        job: Job,
        needs: Mapping[str, Need],
        layers: Mapping[str, Layer],
        sizes: Mapping[str, int],
        most: int | None,
    ) -> None:
        self._ray, self._needs, self._layers, self._sizes, self._most = ray, needs, layers, sizes, most
        self._statistics, self._job = job.statistics, ray.put(job)
        self._task, self._remote = task, ray.remote(max_retries=0, scheduling_strategy="SPREAD")(run_batch)
        self._sends = False

    def run(self, names: Sequence[str], done: Callable[[str, Any], None]) -> None:
        """Run the tasks. `done` gets the result of each."""
        again: list[str] = []
        batches: dict[str, list[str]] = {}

        def keep(first: str, results: Sequence[Any]) -> None:
            for name, result in zip(batches[first], results, strict=True):
                if isinstance(result, NeedsInputs):
                    self._sends = True
                    again.append(name)
                else:
                    done(name, result)

        def submit(first: str) -> Any:
            need = Need.largest([self._needs[name] for name in batches[first]])
            inputs = [self._inputs_of(name) for name in batches[first]]
            return self._remote.options(**need.options()).remote(self._task, self._job, batches[first], inputs)

        while names:
            batches = {batch[0]: batch for batch in self._batches(names)}
            largest = Need.largest([self._needs[name] for name in names])
            run_tasks(self._ray, submit, list(batches), keep, Slots(self._ray, largest, self._most))
            names, again = again, []

    def _batches(self, names: Sequence[str]) -> Iterator[list[str]]:
        """The names from the largest on, small ones several at a time, and fewer near the end.

        So no worker is busy alone at the end.
        """
        left = sum(self._sizes[name] for name in names)
        batch, held = list[str](), 0
        for name in sorted(names, key=lambda name: -self._sizes[name]):
            batch.append(name)
            held += self._sizes[name]
            if held >= min(LEAST_VALUES, max(left // 4, LEAST_VALUES // 16)):
                yield batch
                left -= held
                batch, held = [], 0
        if batch:
            yield batch

    def _inputs_of(self, name: str) -> dict[str, Array] | None:
        """The statistics that go along with a name; None for a worker to read them itself."""
        if name not in self._layers:
            return {}
        return inputs_of(self._statistics, self._layers[name]) if self._sends and self._statistics else None


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
