"""What calibrates in the workers of a cluster: each runs the model over its part of the batches, block by block.

A moment is the sum of the products of all batches, in their order. So that its bytes do not depend on the number of
workers, each panel of a sum passes through the workers in the order of their parts, and each adds its batches to it one
after another, as a single process would. While one worker adds to a panel, the one before it adds to the next.
Therefore a worker keeps the inputs of its batches until the sums of a block are complete.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch

from loftq.calibration.block_weights import BlockWeights
from loftq.calibration.observer import VOCABULARY, InputRecorder, answer_of
from loftq.calibration.progress import filled_with_nan, is_plain, mapped
from loftq.cluster.jobs import Job, plan_here
from loftq.cluster.tasks import Failure, failure_of
from loftq.core.moments import add_to_panel, panel_shape
from loftq.errors import LoftQError
from loftq.models.devices import explain_full_memory
from loftq.models.lockstep import Batch
from loftq.models.lockstep import run as run_in_lockstep
from loftq.planning.plan import Plan

_FULL = "a worker of the cluster has too little memory: use a smaller --sequence-length, or nodes with more memory"
Key = tuple[int, tuple[str, ...]]  # after how many rounds, and the modules that share the input
Panel = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Past:
    """The outputs of the last round that an earlier run has served, for each batch of the part."""

    rounds: int = 0
    outputs: Mapping[int, Any] = field(default_factory=dict)

    def on(self, device: torch.device) -> Past:
        """The same outputs on a device."""
        outputs = {i: mapped(output, lambda tensor: tensor.to(device)) for i, output in self.outputs.items()}
        return Past(self.rounds, outputs)

    def output(self, index: int) -> Any:
        """The output of the last of these rounds for a batch."""
        return self.outputs[index]

    def lost(self, index: int) -> Any:
        """The same structure filled with NaN, in place of an earlier block's output."""
        return filled_with_nan(self.outputs[index])


@dataclass(frozen=True)
class Step:
    """What a worker has done: it has left a block after so many rounds, or has ended (None).

    `sizes` are the number of entries of each input of the block and `counts` the number of its vectors. `passes` counts
    how often a batch has passed a block.
    """

    block: str | None
    rounds: int
    passes: int
    sizes: dict[Key, int]
    counts: dict[Key, int]
    digests: dict[str, str]
    outputs: dict[int, Any]
    answers: list[dict[str, torch.Tensor]]


class Part:
    """An actor: the model of a job and one part of the batches. The model runs in a thread, which waits at each step.

    `threads` is the number of torch's threads: the last bits of a product depend on it.
    """

    def __init__(self, job: Job, batches: Sequence[Batch], past: Past, threads: int) -> None:
        self._threads, self._past = threads, past
        torch.set_num_threads(threads)
        self._device = torch.device(job.device)
        self._steps: queue.Queue[Step | BaseException] = queue.Queue()
        self._turn = threading.Semaphore(0)
        self._due = False
        self._observer: _Observer | None = None
        self._thread = threading.Thread(target=self._work, args=(job, batches), daemon=True)

    def step(self, due: bool) -> Step | Failure:
        """Run the next block; the outputs of its batches are returned if they are `due`."""
        self._due = due
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._turn.release()
        step = self._steps.get()
        if isinstance(step, LoftQError):
            return failure_of(step)
        if isinstance(step, BaseException):
            raise step
        return step

    def add(self, key: Key, index: int, panel: Panel | None) -> Panel:
        """Add the batches of this part to a panel of a sum."""
        observer = cast(_Observer, self._observer)
        inputs = observer.inputs[key]
        size = inputs[0].shape[-1]
        shape = panel_shape(size, index)
        zeros = torch.zeros(shape, dtype=torch.float64, device=self._device)
        total = zeros if panel is None else torch.from_numpy(panel.copy()).to(self._device)
        for tensor in inputs:
            add_to_panel(total, tensor.reshape(-1, size).float(), index)
        return total.cpu().numpy()

    def _work(self, job: Job, batches: Sequence[Batch]) -> None:
        try:
            torch.set_num_threads(self._threads)
            with explain_full_memory(_FULL):
                plan = plan_here(job)
                weights = BlockWeights(plan, self._device, trust_remote_code=job.trust_remote_code)
                self._observer = observer = _Observer(plan, weights, len(batches), self)
                moved = [{name: tensor.to(self._device) for name, tensor in batch.items()} for batch in batches]
                with observer.recorder.watching():
                    run_in_lockstep(weights.core, moved, weights.blocks, observer, self._past.on(self._device))
                observer.end()
        except BaseException as error:  # raised in the thread of `step`
            self._steps.put(error)

    @property
    def due(self) -> bool:
        """Whether the outputs of the current block are returned."""
        return self._due

    def tell(self, step: Step) -> None:
        """Report a step, and wait until the next one is asked for (called in the thread of the model)."""
        self._steps.put(step)
        if step.block is not None:
            self._turn.acquire()


class _Observer:
    """A visitor of `lockstep.run` that keeps the inputs of the layers until they are summed up."""

    def __init__(self, plan: Plan, weights: BlockWeights, batches: int, part: Part) -> None:
        self.recorder = InputRecorder(plan, weights.model)
        self.inputs: dict[Key, list[torch.Tensor]] = {}
        self._plan, self._weights, self._part = plan, weights, part
        self._outputs: dict[int, Any] = {}
        self._answers: list[dict[str, torch.Tensor]] = [{} for _ in range(batches)]
        self._passes = self._rounds = 0

    def enter(self, block: str) -> None:
        self._weights.load(block)

    def keep(self, index: int, output: Any) -> None:
        if self._part.due and is_plain(output):
            self._outputs[index] = mapped(output, lambda tensor: tensor.to("cpu", copy=True))

    def leave(self, block: str, rounds: int) -> None:
        self._weights.drop(block)
        self._tell(block, rounds)

    def passed(self, block: str | None, rounds: int) -> None:
        self._rounds = rounds
        for modules, tensor in self.recorder.take():
            self.inputs.setdefault((rounds, modules), []).append(tensor.clone())  # later code may change it
        if block is not None or not self._weights.blocks:
            self._passes += 1

    def finish(self, index: int, output: Any) -> None:
        self._answers[index] = answer_of(output, self._plan.task.name in VOCABULARY)

    def end(self) -> None:
        """Report the inputs outside the blocks, and the answers."""
        self._tell(None, self._rounds)

    def _tell(self, block: str | None, rounds: int) -> None:
        keys = [key for key in self.inputs if block is None or key[1][0].startswith(f"{block}.")]
        step = Step(
            block,
            rounds,
            self._passes,
            {key: self.inputs[key][0].shape[-1] for key in keys},
            {key: sum(tensor.numel() // tensor.shape[-1] for tensor in self.inputs[key]) for key in keys},
            dict(self._weights.digests),
            self._outputs,
            [] if block is not None else self._answers,
        )
        self._outputs, self._passes = {}, 0
        self._part.tell(step)
        if block is not None:
            for key in keys:
                del self.inputs[key]
