"""What calibrates in the workers of a cluster: each runs the model over its part of the batches, block by block.

A moment is the sum of the products of all batches, in their order. So that its bytes do not depend on the number of
workers, each group of panels of a sum passes through the workers in the order of their parts, and each adds its batches
to it one after another, as a single process would. The products, which are most of the work, are computed before a
group arrives, in the time in which the worker would wait for others. Therefore a worker keeps the inputs of its batches
until the sums of a block are complete.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from loftq.calibration.block_weights import BlockWeights
from loftq.calibration.input_files import Sharing
from loftq.calibration.observer import VOCABULARY, InputRecorder, answer_of, is_within
from loftq.calibration.progress import filled_with_nan, is_plain, mapped
from loftq.calibration.routed_tokens import RoutedTokens
from loftq.cluster.jobs import Job, address_here, node_here, plan_here
from loftq.cluster.sent import Array, arrays_of, sendable
from loftq.cluster.tasks import Failure, failure_of
from loftq.cluster.threads import Threads
from loftq.core.kernels.products import fast_products
from loftq.core.moments import panel_groups, panel_products, zero_panel
from loftq.errors import LoftQError
from loftq.models.devices import explain_full_memory
from loftq.models.image_text import placed
from loftq.models.lockstep import Batch
from loftq.models.lockstep import run as run_in_lockstep
from loftq.models.refusals import explain_forward
from loftq.planning.plan import Plan

_FULL = "a worker of the cluster has too little memory: use a smaller --sequence-length, or nodes with more memory"
_AHEAD_BYTES = 2**28  # of products that are computed before their group arrives
Panels = list[np.ndarray[Any, np.dtype[np.float64]]]


class Visit(NamedTuple):
    """An input of a block: after how many rounds it came, and the modules that share it, or an experts module."""

    rounds: int
    modules: Sharing


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

    `sizes` are the number of entries of each input of the block, and `counts` the number of its vectors. `routed` are
    the tokens of experts modules. `passes` counts how often a batch has passed a block, in so many `seconds`. `node` is
    the address of the worker's node, and `worker` the id of its process.
    """

    block: str | None
    rounds: int
    passes: int
    sizes: dict[Visit, int]
    counts: dict[Visit, int]
    routed: dict[Visit, dict[str, Array]]
    digests: dict[str, str]
    outputs: dict[int, Any]
    answers: list[dict[str, torch.Tensor]]
    seconds: float
    node: str
    worker: int


def summed_groups(sizes: Mapping[Visit, int]) -> list[tuple[list[Visit], range]]:
    """The groups of panels of each sum, with the visits whose inputs it adds, in the order of a single process."""
    sums: dict[Sharing, list[Visit]] = {}
    for visit in sorted(sizes, key=lambda visit: visit.rounds):  # stable
        sums.setdefault(visit.modules, []).append(visit)
    return [(visits, group) for visits in sums.values() for group in panel_groups(sizes[visits[0]])]


class Part:
    """An actor: the model of a job and one part of the batches. It computes with the driver's numbers of threads.

    The model runs in a thread. At each step it waits to be asked for the next one, and computes products meanwhile.
    """

    def __init__(self, job: Job, threads: Threads) -> None:
        self._job, self._threads = job, threads
        threads.use()
        self._device = torch.device(job.device)
        self._steps: queue.Queue[Step | BaseException] = queue.Queue()
        self.due = False  # whether the outputs of the current block are returned
        self._observer: _Observer | None = None
        self._thread = threading.Thread()
        self._state = threading.Condition()  # guards what follows, and is held while products are computed
        self._ahead: dict[tuple[Visit, range], list[list[torch.Tensor]]] = {}  # of groups that are not added yet
        self._asked = False  # whether the next step may begin
        self._wanted = False  # whether `add` waits for a product to end

    def node(self) -> str:
        """The id of the node on which this worker is."""
        return node_here()

    def take(self, batches: Sequence[Batch], past: Past) -> None:
        """Take the batches of this part."""
        self._thread = threading.Thread(target=self._work, args=(batches, past), daemon=True)

    def step(self, due: bool) -> Step | Failure:
        """Run the next block; the outputs of its batches are returned if they are `due`."""
        self.due = due
        if self._thread.ident is None:
            self._thread.start()
        else:
            with self._state:
                self._asked = True
                self._state.notify_all()
        step = self._steps.get()
        if isinstance(step, LoftQError):
            return failure_of(step)
        if isinstance(step, BaseException):
            raise step
        return step

    def add(self, visit: Visit, group: range, before: Panels | None) -> Panels:
        """Add the batches of this part, in their order, to a group of panels of a sum."""
        self._wanted = True
        with self._state:
            self._wanted = False
            computed = self._ahead.pop((visit, group), [])
            size = cast(_Observer, self._observer).inputs[visit][0].shape[-1]
            if before is None:
                totals = [zero_panel(size, index, self._device) for index in group]
            else:
                totals = [torch.from_numpy(panel.copy()).to(self._device) for panel in before]
            for i, x in enumerate(self._vectors(visit)):
                products = computed[i] if i < len(computed) else _products(x, group)
                for total, product in zip(totals, products, strict=True):
                    total += product
            self._state.notify_all()
        return [total.cpu().numpy() for total in totals]

    def _vectors(self, visit: Visit) -> Iterator[torch.Tensor]:
        for tensor in cast(_Observer, self._observer).inputs[visit]:
            yield tensor.reshape(-1, tensor.shape[-1]).float()

    def _work(self, batches: Sequence[Batch], past: Past) -> None:
        job = self._job
        try:
            self._threads.use()
            with explain_full_memory(_FULL):
                plan = plan_here(job)
                weights = BlockWeights(plan, self._device, trust_remote_code=job.trust_remote_code)
                self._observer = observer = _Observer(plan, weights, len(batches), self)
                inputs = [placed(batch, self._device, weights.dtype) for batch in batches]
                with fast_products(), observer.recorder.watching(), explain_forward(plan.source.name, plan.model_type):
                    run_in_lockstep(weights.core, inputs, weights.blocks, observer, past.on(self._device))
                observer.end()
        except BaseException as error:  # raised in the thread of `step`
            self._steps.put(error)

    def tell(self, step: Step) -> None:
        """Report a step, and wait until the next one is asked for (called in the thread of the model)."""
        with self._state:
            self._ahead = {(visit, group): [] for visits, group in summed_groups(step.sizes) for visit in visits}
            self._asked = step.block is None
        self._steps.put(step)
        for visit, group in list(self._ahead):
            self._compute(visit, group)
        with self._state:
            self._state.wait_for(lambda: self._asked)

    def _compute(self, visit: Visit, group: range) -> None:
        """Compute the products of a group until it is added, not while too many are held, nor while `add` waits."""
        for x in self._vectors(visit):
            with self._state:
                self._state.wait_for(lambda: (visit, group) not in self._ahead or not (self._wanted or self._is_full()))
                if (visit, group) not in self._ahead:
                    return
                self._ahead[visit, group].append(_products(x, group))

    def _is_full(self) -> bool:
        """Whether as many products are held as may be."""
        found = (product for computed in self._ahead.values() for products in computed for product in products)
        return sum(product.nbytes for product in found) > _AHEAD_BYTES


def _products(x: torch.Tensor, group: range) -> list[torch.Tensor]:
    with fast_products():
        return panel_products(x, group)


class _Observer:
    """A visitor of `lockstep.run` that keeps the inputs of the layers until they are summed up."""

    def __init__(self, plan: Plan, weights: BlockWeights, batches: int, part: Part) -> None:
        self.recorder = InputRecorder(plan, weights.model)
        self.inputs: dict[Visit, list[torch.Tensor]] = {}
        self._routed: dict[Visit, list[RoutedTokens]] = {}
        self._plan, self._weights, self._part = plan, weights, part
        self._outputs: dict[int, Any] = {}
        self._answers: list[dict[str, torch.Tensor]] = [{} for _ in range(batches)]
        self._passes = self._rounds = 0
        self._began = time.perf_counter()

    def enter(self, block: str) -> None:
        self._weights.load(block)

    def keep(self, index: int, output: Any) -> None:
        if self._part.due and is_plain(output):
            self._outputs[index] = sendable(output)

    def leave(self, block: str, rounds: int) -> None:
        self._weights.drop(block)
        self._tell(block, rounds)

    def passed(self, block: str | None, rounds: int) -> None:
        self._rounds = rounds
        for modules, tensor in self.recorder.take_inputs():
            self.inputs.setdefault(Visit(rounds, modules), []).append(tensor.clone())  # later code may change it
        for module, tokens in self.recorder.take_tokens():
            self._routed.setdefault(Visit(rounds, (module,)), []).append(tokens)
        if block is not None or not self._weights.blocks:
            self._passes += 1

    def finish(self, index: int, output: Any) -> None:
        self._answers[index] = answer_of(output, self._plan.task.name in VOCABULARY)

    def end(self) -> None:
        """Report the inputs outside the blocks, and the answers."""
        self._tell(None, self._rounds)

    def _tell(self, block: str | None, rounds: int) -> None:
        """Report the inputs in a block, or all that are left, and forget them when the next step is asked for."""
        visits = [visit for visit in self.inputs if is_within(visit.modules[0], block)]
        owners = [visit for visit in self._routed if is_within(visit.modules[0], block)]
        step = Step(
            block,
            rounds,
            self._passes,
            {visit: self.inputs[visit][0].shape[-1] for visit in visits},
            {visit: sum(tensor.numel() // tensor.shape[-1] for tensor in self.inputs[visit]) for visit in visits},
            {visit: arrays_of(RoutedTokens.joined(self._routed.pop(visit))) for visit in owners},
            dict(self._weights.digests),
            self._outputs,
            [] if block is not None else self._answers,
            time.perf_counter() - self._began,
            address_here(),
            os.getpid(),
        )
        self._outputs, self._passes = {}, 0
        self._part.tell(step)
        self._began = time.perf_counter()
        if block is not None:
            for visit in visits:
                del self.inputs[visit]
