"""Calibrates on a cluster: the batches are split over workers, which the driver leads from block to block."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from loftq.calibration.forward import Answers, WorkerLostError
from loftq.calibration.input_files import InputFiles, Sharing
from loftq.calibration.progress import Progress
from loftq.calibration.routed_tokens import RoutedTokens
from loftq.cluster.jobs import Job, node_here
from loftq.cluster.nodes import Need
from loftq.cluster.part import Part, Past, Step, Visit, summed_groups
from loftq.cluster.rates import Rates
from loftq.cluster.sent import received, routed_tokens
from loftq.cluster.tasks import Failure, Slots, explain
from loftq.cluster.threads import Threads
from loftq.core.moments import Moment
from loftq.display import one_line
from loftq.errors import ClusterError, SourceError
from loftq.models.lockstep import Batch

_MOST_LOSSES = 20  # of workers, without any progress in between
_PATIENCE = 60.0  # seconds to wait for a node on which a worker can start
_IN_FLIGHT = 8  # groups of panels that pass through the workers at the same time, at least
MOST_GPUS = 8  # with more, reading and passing on take longer than computing


@dataclass
class Calibrating:
    """Runs the model over batches on a cluster. It is the `forward` of `gather`. Workers compute with `threads`."""

    ray: Any
    job: Job
    need: Need
    threads: Threads
    most: int | None
    _losses: int = field(default=0, init=False)
    _rounds: int = field(default=0, init=False)  # that were recorded when the last worker was lost

    def __call__(
        self, batches: Sequence[Batch], files: InputFiles, progress: Progress, bar: Any
    ) -> tuple[Answers, dict[str, str]]:
        """Write the files. Returns the answers, and the SHA-256 of each tensor that was read.

        Raises WorkerLostError if a worker died, until too many have died.
        """
        parts: list[Any] = []
        try:
            parts = self._start(batches, progress)
            return _Lead(self.ray, parts, len(batches), files, progress, bar).run()
        except self.ray.exceptions.RayError as error:
            explain(self.ray, "calibration", error)
            self._losses = self._losses + 1 if progress.rounds == self._rounds else 1
            self._rounds = progress.rounds
            if self._losses > _MOST_LOSSES:
                raise ClusterError(
                    f"calibration: {self._losses} workers of the cluster died ({one_line(error, 200)}): if their "
                    "memory was full, use a smaller --sequence-length or nodes with more memory; run again to continue"
                ) from error
            raise WorkerLostError from error
        finally:
            for part in parts:
                self.ray.kill(part)

    def _start(self, batches: Sequence[Batch], progress: Progress) -> list[Any]:
        """The workers, each with the batches that follow those of the one before."""
        most = self.most if not self.need.gpus else min(self.most or MOST_GPUS, MOST_GPUS)
        slots = Slots(self.ray, self.need, most)
        until = time.monotonic() + _PATIENCE
        while not (count := min(slots.count(), len(batches))):
            if time.monotonic() > until:
                raise ClusterError("calibration: no node of the cluster has room for a worker: run again to continue")
            time.sleep(1.0)
        strategy = "DEFAULT" if self.need.gpus else "SPREAD"  # GPUs of few nodes, which read each block
        actor = self.ray.remote(max_restarts=0, scheduling_strategy=strategy)(Part).options(**self.need.options())
        job = self.ray.put(self.job)
        parts = [actor.remote(job, self.threads) for _ in range(count)]
        nodes = self.ray.get([part.node.remote() for part in parts])
        here = node_here()
        # Sums pass from worker to worker, and then to this process: as few of them as possible to another node.
        order = sorted(range(count), key=lambda i: (nodes[i] == here, nodes[i], i))
        parts, taken = [parts[i] for i in order], []
        for i, part in enumerate(parts):
            begin, end = (len(batches) * bound // count for bound in (i, i + 1))
            outputs = {j - begin: progress.output(j) for j in range(begin, end)} if progress.rounds else {}
            taken.append(part.take.remote(list(batches[begin:end]), Past(progress.rounds, outputs)))
        self.ray.get(taken)
        return parts


class _Lead:
    """Leads the workers from block to block, and writes what they have summed up while they run the next block."""

    def __init__(
        self, ray: Any, parts: list[Any], batches: int, files: InputFiles, progress: Progress, bar: Any
    ) -> None:
        self._ray, self._parts, self._batches = ray, parts, batches
        self._files, self._progress, self._bar = files, progress, bar
        self._rates = Rates(" blocks")  # of a batch
        self._due = False  # whether the outputs of the next block are returned
        self._next: list[Any] = []  # references to the next step of each worker

    def run(self) -> tuple[Answers, dict[str, str]]:
        """Run all blocks. Returns the answers in the order of the batches, and the hashes of the tensors."""
        digests = dict(self._progress.digests)
        self._ask(self._progress.is_time())
        while True:
            steps = self._steps()
            for step in steps:
                _merge(digests, step.digests)
            block, rounds = steps[0].block, steps[0].rounds
            if any((step.block, step.rounds) != (block, rounds) for step in steps):
                raise SourceError(
                    "calibration: the blocks of this model run in an order that depends on the text, which the workers "
                    "of a cluster cannot follow: calibrate without --cluster"
                )
            self._files.save(self._sums(steps), _routed(steps))
            self._keep(steps)
            self._bar.update(sum(step.passes for step in steps))
            self._bar.set_postfix_str(str(self._rates), refresh=False)
            if block is None:
                return [answer for step in steps for answer in step.answers], digests
            self._progress.end(rounds, self._batches, self._files.modules, digests, self._files.count)

    def _ask(self, due: bool) -> None:
        """Let every worker run its next block."""
        self._due = due
        self._next = [part.step.remote(due) for part in self._parts]

    def _steps(self) -> list[Step]:
        """The next block of every worker."""
        self._progress.begin(self._due)
        steps = self._ray.get(self._next)
        for step in steps:
            if isinstance(step, Failure):
                raise step.error()
            self._rates.add(step.node, step.worker, step.passes, step.seconds)
        return cast(list[Step], steps)

    def _keep(self, steps: Sequence[Step]) -> None:
        """Write the outputs of the block, if they are due."""
        begin = 0
        for i, step in enumerate(steps):
            for index, output in step.outputs.items():
                self._progress.keep(begin + index, received(output))
            begin = self._batches * (i + 1) // len(self._parts)

    def _sums(self, steps: Sequence[Step]) -> dict[Sharing, Moment]:
        """The sums of a block by the modules that share an input. When all are on their way, the workers go on."""
        sizes = {visit: size for step in steps for visit, size in step.sizes.items()}
        moments: dict[Sharing, Moment] = {}
        flying: deque[tuple[Sharing, range, Any]] = deque()
        for modules, group, panels in self._passed_through(steps, sizes):
            moments.setdefault(modules, Moment(sizes[next(visit for visit in sizes if visit.modules == modules)]))
            flying.append((modules, group, panels))
            if len(flying) > max(_IN_FLIGHT, len(self._parts)):
                self._land(moments, *flying.popleft())
        if steps[0].block is not None:
            self._ask(self._progress.is_time() and not self._progress.due)
        while flying:
            self._land(moments, *flying.popleft())
        for visit in sizes:
            moments[visit.modules].count += sum(step.counts.get(visit, 0) for step in steps)
        return moments

    def _passed_through(self, steps: Sequence[Step], sizes: dict[Visit, int]) -> Iterator[tuple[Sharing, range, Any]]:
        """Each group of panels of each sum, as it leaves the last worker."""
        for visits, group in summed_groups(sizes):
            panels: Any = None
            for visit in visits:
                for part, step in zip(self._parts, steps, strict=True):
                    if visit in step.sizes:
                        panels = part.add.remote(visit, group, panels)
            yield visits[0].modules, group, panels

    def _land(self, moments: dict[Sharing, Moment], modules: Sharing, group: range, panels: Any) -> None:
        for index, panel in zip(group, self._ray.get(panels), strict=True):
            moments[modules].panels[index].numpy()[:] = panel


def _routed(steps: Sequence[Step]) -> dict[str, list[RoutedTokens]]:
    """The tokens of experts modules, in the order of a single process."""
    routed: dict[str, list[RoutedTokens]] = {}
    visits = {visit: None for step in steps for visit in step.routed}
    for visit in sorted(visits, key=lambda visit: visit.rounds):
        found = [step.routed[visit] for step in steps if visit in step.routed]
        routed.setdefault(visit.modules[0], []).extend(map(routed_tokens, found))
    return routed


def _merge(digests: dict[str, str], found: dict[str, str]) -> None:
    """Add the hashes that a worker has seen. Raises SourceError if another worker has read other bytes."""
    for name, digest in found.items():
        if digests.setdefault(name, digest) != digest:
            raise SourceError(
                f"calibration: nodes of the cluster have different bytes in tensor {name!r}: copy the same files to "
                "all nodes, or name a folder that all nodes see"
            )
