"""The time that a run takes on a cluster, from the rates of its nodes.

Covers: loftq/cluster/estimate.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_ray import FakeRay, node

from loftq.cluster.estimate import Sample, estimate, rates_task
from loftq.cluster.nodes import Need, nodes_of
from loftq.hub.source import find_source
from loftq.planning.plan import Plan
from loftq.planning.planner import make_plan
from loftq.planning.recipe import resolve
from loftq.planning.settings import QuantizeSettings


@pytest.fixture(scope="module")
def plan(pico: Path) -> Plan:
    return make_plan(find_source(str(pico)), resolve(QuantizeSettings(rank=4, iters=1)))


def test_seconds_are_the_weights_over_the_rates_of_all_tasks(plan: Plan) -> None:
    nodes = nodes_of(FakeRay(node("a", 2), node("b", 1)))
    found = estimate(plan, nodes, Need(1, 0, 1), None, {"a": (100.0, 1.0), "b": (50.0, 1.0)})
    assert found["tasks"] == 3
    assert found["seconds_of_parts"] == {"solving": plan.weights / 250}
    limited = estimate(plan, nodes, Need(1, 0, 1), 1, {"a": (100.0, 1.0), "b": (50.0, 1.0)})
    assert limited["tasks"] == 1
    assert limited["seconds_of_parts"]["solving"] == pytest.approx(3 * plan.weights / 250)


def test_at_most_eight_gpus_calibrate(pico: Path) -> None:
    """So four nodes of eight solve four times as fast as one, and calibrate as fast."""
    recipe = resolve(QuantizeSettings(rank=4, iters=1, calibration="default", calibration_tokens=65536))
    plan = make_plan(find_source(str(pico)), recipe)
    names = ("a", "b", "c", "d")
    one, four = (
        estimate(plan, nodes_of(FakeRay(*(node(name, 8, 8) for name in few))), Need(1, 1, 1), None, rates)
        for few, rates in ((names[:1], {"a": (9.0, 5.0)}), (names, dict.fromkeys(names, (9.0, 5.0))))
    )
    assert one["seconds_of_parts"]["solving"] == pytest.approx(4 * four["seconds_of_parts"]["solving"])
    assert one["seconds_of_parts"]["calibrating"] == pytest.approx(four["seconds_of_parts"]["calibrating"])


def test_rates_are_measured_with_the_recipe(plan: Plan) -> None:
    sample = Sample.of(plan, torch.device("cpu"))
    assert sample.recipe is plan.recipe
    rates = rates_task(sample)
    assert isinstance(rates, tuple)
    assert min(rates) > 0
