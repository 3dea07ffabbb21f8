"""Calibrates on a cluster: the batches are split over workers, which the driver leads from block to block."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from loftq.calibration.gather import Answers, WorkerLostError
from loftq.calibration.observer import MomentFiles
from loftq.calibration.progress import Progress
from loftq.cluster.jobs import Job
from loftq.cluster.nodes import Need
from loftq.cluster.part import Key, Part, Past, Step
from loftq.cluster.tasks import Failure, Slots, explain
from loftq.core.moments import Moment, panels_of
from loftq.display import one_line
from loftq.errors import LoftQError, SourceError
from loftq.models.lockstep import Batch

_MOST_LOSSES = 20  # of workers, in one calibration
_PATIENCE = 60.0  # seconds to wait for a node on which a worker can start


@dataclass
class Calibrating:
    """Runs the model over batches on a cluster. It is the `elsewhere` of `gather`.

    Each worker computes with `threads` threads of torch.
    """

    ray: Any
    job: Job
    need: Need
    threads: int
    most: int | None
    _losses: int = field(default=0, init=False)

    def __call__(
        self, batches: Sequence[Batch], moments: MomentFiles, progress: Progress, bar: Any
    ) -> tuple[Answers, dict[str, str]]:
        """Write the moments. Returns the answers, and the SHA-256 of each tensor that was read.

        Raises WorkerLostError if a worker died, until too many have died.
        """
        parts: list[Any] = []
        try:
            parts = self._start(batches, progress)
            return _Lead(self.ray, parts, len(batches), moments, progress, bar).run()
        except self.ray.exceptions.RayError as error:
            explain(self.ray, "calibration", error)
            self._losses += 1
            if self._losses > _MOST_LOSSES:
                raise LoftQError(
                    f"calibration: {self._losses} workers of the cluster died ({one_line(error, 200)}): if their "
                    "memory was full, use a smaller --sequence-length or nodes with more memory; run again to continue"
                ) from error
            raise WorkerLostError from error
        finally:
            for part in parts:
                self.ray.kill(part)

    def _start(self, batches: Sequence[Batch], progress: Progress) -> list[Any]:
        """The workers, each with the batches that follow those of the one before."""
        slots = Slots(self.ray, self.need, self.most)
        until = time.monotonic() + _PATIENCE
        while not (count := min(slots.count(), len(batches))):
            if time.monotonic() > until:
                raise LoftQError("calibration: no node of the cluster has room for a worker: run again to continue")
            time.sleep(1.0)
        actor = self.ray.remote(max_restarts=0, scheduling_strategy="SPREAD")(Part).options(**self.need.options())
        job = self.ray.put(self.job)
        parts = []
        for i in range(count):
            begin, end = (len(batches) * bound // count for bound in (i, i + 1))
            outputs = {j - begin: progress.output(j) for j in range(begin, end)} if progress.rounds else {}
            parts.append(actor.remote(job, list(batches[begin:end]), Past(progress.rounds, outputs), self.threads))
        return parts


class _Lead:
    """Leads the workers from block to block, and writes what they have summed up."""

    def __init__(
        self, ray: Any, parts: list[Any], batches: int, moments: MomentFiles, progress: Progress, bar: Any
    ) -> None:
        self._ray, self._parts, self._batches = ray, parts, batches
        self._moments, self._progress, self._bar = moments, progress, bar

    def run(self) -> tuple[Answers, dict[str, str]]:
        """Run all blocks. Returns the answers in the order of the batches, and the hashes of the tensors."""
        digests = dict(self._progress.digests)
        while True:
            self._progress.begin()
            steps = self._step()
            for step in steps:
                _merge(digests, step.digests)
            block, rounds = steps[0].block, steps[0].rounds
            if any((step.block, step.rounds) != (block, rounds) for step in steps):
                raise SourceError(
                    "calibration: the blocks of this model run in an order that depends on the text, which the workers "
                    "of a cluster cannot follow: calibrate without --cluster"
                )
            self._moments.save(self._sums(steps))
            self._bar.update(sum(step.passes for step in steps))
            self._bar.set_postfix_str(f"{len(self._parts)} workers", refresh=False)
            if block is None:
                return [answer for step in steps for answer in step.answers], digests
            self._keep(steps)
            self._progress.end(rounds, self._batches, self._moments.modules, digests, self._moments.files)

    def _step(self) -> list[Step]:
        """The next block of every worker."""
        steps = self._ray.get([part.step.remote(self._progress.due) for part in self._parts])
        for step in steps:
            if isinstance(step, Failure):
                raise step.error()
        return cast(list[Step], steps)

    def _keep(self, steps: Sequence[Step]) -> None:
        """Write the outputs of the block, if they are due."""
        begin = 0
        for i, step in enumerate(steps):
            for index, output in step.outputs.items():
                self._progress.keep(begin + index, output)
            begin = self._batches * (i + 1) // len(self._parts)

    def _sums(self, steps: Sequence[Step]) -> dict[tuple[str, ...], Moment]:
        """The sums of a block by the modules that share an input, in the order of a single process."""
        keys: dict[Key, int] = {key: size for step in steps for key, size in step.sizes.items()}
        panels: dict[tuple[tuple[str, ...], int], Any] = {}
        sizes: dict[tuple[str, ...], int] = {}
        counts: dict[tuple[str, ...], int] = {}
        for key in sorted(keys, key=lambda key: key[0]):  # a stable sort by rounds
            modules = key[1]
            sizes[modules] = keys[key]
            for part, step in zip(self._parts, steps, strict=True):
                if key in step.sizes:
                    counts[modules] = counts.get(modules, 0) + step.counts[key]
                    for index in range(panels_of(keys[key])):
                        before = panels.get((modules, index))
                        panels[modules, index] = part.add.remote(key, index, before)
        return {modules: self._moment(modules, size, counts[modules], panels) for modules, size in sizes.items()}

    def _moment(self, modules: tuple[str, ...], size: int, count: int, panels: dict[Any, Any]) -> Moment:
        moment = Moment(size)
        for index, panel in enumerate(moment.panels):
            panel.copy_(torch.from_numpy(self._ray.get(panels.pop((modules, index))).copy()))
        moment.count = count
        return moment


def _merge(digests: dict[str, str], found: dict[str, str]) -> None:
    """Add the hashes that a worker has seen. Raises SourceError if another worker has read other bytes."""
    for name, digest in found.items():
        if digests.setdefault(name, digest) != digest:
            raise SourceError(
                f"calibration: nodes of the cluster have different bytes in tensor {name!r}: copy the same files to "
                "all nodes, or name a folder that all nodes see"
            )
