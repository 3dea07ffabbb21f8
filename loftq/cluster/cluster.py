"""A cluster as the place where a run's layers are calibrated and solved."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from loftq.artifacts.staging import Staging
from loftq.calibration.block_weights import computing_dtype
from loftq.calibration.statistics import Statistics, headers_digest
from loftq.cluster.calibrating import Calibrating
from loftq.cluster.connection import connected
from loftq.cluster.estimate import Sample, estimate, rates_task
from loftq.cluster.jobs import Job, SharedFolder, check_versions, machine_here, sizes_of, version_probe
from loftq.cluster.nodes import PROCESS_BYTES, Need, Node, check_need, nodes_of
from loftq.cluster.spread import measuring, refining, solving
from loftq.cluster.tasks import Failure, explain
from loftq.cluster.threads import threads_here
from loftq.cluster.work import check_task
from loftq.display import one_line
from loftq.errors import ClusterError, OptionError
from loftq.models.devices import is_here
from loftq.planning.plan import Plan
from loftq.planning.run import Run
from loftq.solving.allocate import MeasureErrors
from loftq.solving.distill import RefineFolder
from loftq.solving.layers import RunJobs
from loftq.solving.memory import calibrating_bytes, kept_inputs_bytes, solving_bytes

_NOTHING = Need(0, 0, 0)  # of a task that asks a node for what it has
_ONE_DEVICE = "so that the bytes do not depend on the number of workers, which would each add to the gradients"


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
        if statistics is not None:
            statistics = replace(statistics, folder=statistics.folder.resolve())
        return Job(
            key=secrets.token_hex(8),
            model=self.model,
            revision=plan.source.revision,
            token=self.run.token,
            trust_remote_code=self.run.trust_remote_code,
            headers=headers_digest(plan.source.checkpoint),
            sizes=sizes_of(plan),
            recipe=plan.recipe,
            widths={layer.module: layer.bits for layer in plan.linears} if plan.recipe.measures_widths else None,
            device=self.run.device.type,
            versions=version_probe()(),
            machine=machine_here(),
            output=output,
            statistics=statistics,
        )

    def need(self, nbytes: int, cores: int = 1) -> Need:
        """What a task asks for that needs so many bytes beside its process."""
        return Need(cores, 0 if self.run.device.type == "cpu" else 1, nbytes + PROCESS_BYTES)

    def check(self, plan: Plan) -> None:
        """Raise LoftQError unless all nodes can do the work: they need its versions, its source, memory and GPUs."""
        nodes = self._checked_nodes(self._largest_need(plan))
        for _, refusal in self._ask(check_task, nodes, _NOTHING, self.job(plan)):
            if refusal:
                raise OptionError(refusal)

    def estimate(self, plan: Plan) -> dict[str, Any]:
        """The nodes, and the seconds that each part of a run is expected to take. A worker of each node is measured."""
        need, rates = self._largest_need(plan), {}
        nodes = [node for node in self._checked_nodes(need) if need.tasks_on(node)]
        for node, found in self._ask(rates_task, nodes, Need(1, need.gpus, 0), Sample.of(plan, self.run.device)):
            if isinstance(found, Failure):
                raise found.error()
            rates[node.id] = found
        planned = estimate(plan, [node for node in nodes if node.id in rates], need, self.run.tasks, rates)
        if plan.recipe.calibration is None or not plan.recipe.refine:
            return planned
        where = "this machine" if is_here(self.run.device) else "one GPU of the cluster"
        return {**planned, "refining": f"on {where}, {_ONE_DEVICE}"}

    def forward(self, plan: Plan) -> Calibrating | None:
        """What runs the model of `gather` on the cluster. None for a recipe without a text."""
        if plan.recipe.calibration is None:
            return None
        nodes, device = self.nodes, self.run.device
        threads = threads_here()  # the last bits of products depend on their numbers
        cores = min(threads.torch, max(node.cores for node in nodes)) if device.type == "cpu" else 1
        nbytes = calibrating_bytes(plan, computing_dtype(plan, device)) + kept_inputs_bytes(plan, device)
        need = self.need(nbytes, cores)
        check_need(nodes, need, "calibrating")
        return Calibrating(self.ray, self.job(plan), need, threads, self.run.tasks)

    def solve(self, plan: Plan, staging: Staging, statistics: Statistics | None) -> RunJobs:
        """What runs the jobs of `solve_all` on the cluster."""
        needs = {name: self.need(2 * plan.source.checkpoint.tensors[name].nbytes) for name in plan.passed}
        needs |= {layer.tensor: self.need(solving_bytes(plan, layer)) for layer in plan.layers}
        return solving(self.ray, lambda output: self.job(plan, statistics, output), plan, staging, needs, self.run)

    def measure(self, plan: Plan, statistics: Statistics | None) -> MeasureErrors:
        """What measures layers for `allocate` on the cluster."""
        needs = {layer.module: self.need(solving_bytes(plan, layer)) for layer in plan.linears}
        return measuring(self.ray, replace(self.job(plan, statistics), widths=None), plan, needs, self.run)

    def refine(self, plan: Plan, staging: Staging, statistics: Statistics) -> RefineFolder | None:
        """What refines on a GPU of the cluster; None if this machine has the device itself.

        One device refines: the steps are few and small, and gradients that are summed over several devices would make
        the bytes depend on their number.
        """
        if is_here(self.run.device):
            return None
        need = self.need(plan.backbone_bytes)
        return refining(self.ray, lambda output: self.job(plan, statistics, output), staging, need)

    def _checked_nodes(self, need: Need) -> list[Node]:
        """The nodes that have cores or GPUs for a task, and whose versions are those of this process."""
        nodes, expected = self.nodes, version_probe()()
        check_need(nodes, need, "the largest layer")
        nodes = [node for node in nodes if replace(need, memory=0).tasks_on(node)]
        for node, found in self._ask(version_probe(), nodes, _NOTHING, None):
            check_versions(expected, found, node.address)
        return nodes

    def _largest_need(self, plan: Plan) -> Need:
        """What the task of the largest layer asks for."""
        return self.need(max(solving_bytes(plan, layer) for layer in plan.layers))

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
            except self.ray.exceptions.TaskUnschedulableError:
                continue  # it has left
            except self.ray.exceptions.RayError as error:
                explain(self.ray, f"node {node.address}", error)  # if it died, its tasks run elsewhere


@contextmanager
def open_cluster(run: Run, model: str | None, *, any_device: bool) -> Iterator[Cluster]:
    """The cluster of a run. With `any_device` it computes on GPUs if a node has one, otherwise on the run's device.

    Raises OptionError if no cluster can be joined, or if it lacks what the run asks for.
    """
    with connected(str(run.cluster), run.tasks) as ray:
        if any_device and any(node.gpus for node in nodes_of(ray)):
            run = replace(run, device=torch.device("cuda"))
        try:
            yield Cluster(ray, model, run)
        except ray.exceptions.RayError as error:
            explain(ray, "--cluster", error)
            raise ClusterError(f"the cluster failed ({one_line(error, 200)}): run again with --resume") from error
