"""What a run would take on a cluster: its nodes, the tasks that fit on them, and the time, from measured rates."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from loftq.calibration.gather import BATCH_TOKENS
from loftq.cluster.calibrating import MOST_GPUS
from loftq.cluster.nodes import Need, Node
from loftq.cluster.tasks import Failure, failure_of
from loftq.core.grid import Decoder
from loftq.errors import LoftQError
from loftq.planning.plan import Plan
from loftq.planning.recipe import Recipe
from loftq.solving.layers import one_thread_each, solve_by

_WEIGHTS = 1 << 19  # weights that are solved to measure a rate
_WIDTH = 1024  # inputs of that sample, at most
_TOKENS = 1024  # rows of the product that is measured


@dataclass(frozen=True)
class Sample:
    """A weight of random numbers that is solved to measure a rate, with the recipe and the type of a layer."""

    rows: int
    columns: int
    recipe: Recipe
    quantizer: Decoder
    device: str

    @classmethod
    def of(cls, plan: Plan, device: torch.device) -> Sample:
        """A sample of the largest layer of a plan."""
        layer = max(plan.layers, key=lambda layer: layer.weights)
        _, width = layer.matrix
        columns = _WIDTH if width % _WIDTH == 0 else width
        rows = max(_WEIGHTS // columns, 2 * plan.recipe.rank)
        quantizer = plan.decoder(replace(layer, shape=(rows, columns)))
        return cls(rows, columns, plan.recipe, quantizer, device.type)


def rates_task(sample: Sample) -> tuple[float, float] | Failure:
    """The weights that a worker solves in a second, and the floating-point operations of its products."""
    try:
        with one_thread_each():
            return _solving_rate(sample), _product_rate(torch.device(sample.device))
    except LoftQError as error:
        return failure_of(error)


def _solving_rate(sample: Sample) -> float:
    recipe, device = sample.recipe, torch.device(sample.device)
    weight = torch.randn(sample.rows, sample.columns, generator=torch.Generator().manual_seed(0)).to(device)
    moment = torch.eye(sample.columns, device=device) + 0.1 if recipe.calibration is not None else None
    for _ in range(2):  # the first time, kernels are compiled
        started = time.perf_counter()
        solve_by(recipe, weight, moment, sample.quantizer, recipe.iters, 0, recipe.rank).b.tolist()
        seconds = time.perf_counter() - started
    return weight.numel() / seconds


def _product_rate(device: torch.device) -> float:
    x = torch.randn(_TOKENS, _WIDTH, device=device)
    for _ in range(2):
        started = time.perf_counter()
        (x.t() @ x).sum().item()
        seconds = time.perf_counter() - started
    return 2 * _TOKENS * _WIDTH**2 / seconds


def estimate(
    plan: Plan, nodes: Sequence[Node], need: Need, most: int | None, rates: Mapping[str, tuple[float, float]]
) -> dict[str, Any]:
    """The nodes, the number of tasks at a time, and the seconds of each part of a run.

    `rates` are the two rates of a worker on each node, by its id.
    """
    counts = [need.tasks_on(node) for node in nodes]
    tasks = sum(counts) if most is None else min(sum(counts), most)
    share = tasks / (sum(counts) or 1)
    solving, products = (
        sum(count * rates[node.id][kind] for node, count in zip(nodes, counts, strict=True)) * share for kind in (0, 1)
    )
    seconds = {"solving": plan.weights / solving}
    if plan.recipe.calibration is not None:
        tokens = plan.recipe.calibration_tokens or 0
        sums = {(layer.owner, layer.matrix[1]): layer.matrix[1] ** 2 for layer in plan.linears}
        operations = tokens * (2 * plan.weights + sum(sums.values()))
        workers = min(tasks, -(-tokens // BATCH_TOKENS), MOST_GPUS if need.gpus else tasks)
        seconds = {"calibrating": operations / (products * workers / tasks), **seconds}
    rows = [asdict(node) for node in nodes]
    return {"nodes": rows, "tasks": tasks, "task_memory_bytes": need.memory, "seconds_of_parts": seconds}
