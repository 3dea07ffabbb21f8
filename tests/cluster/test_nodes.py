"""What fits on the nodes of a cluster."""

from __future__ import annotations

import pytest
from fake_ray import FakeRay, node

from loftq.cluster.nodes import Need, check_need, nodes_of, tasks_at_once
from loftq.errors import OptionError

GB = 10**9


def test_the_scarcest_resource_decides() -> None:
    nodes = nodes_of(FakeRay(node("10.0.0.3", 8, 2, 10 * GB), node("10.0.0.2", 4, 0, 100 * GB)))
    assert [found.address for found in nodes] == ["10.0.0.2", "10.0.0.3"]
    assert [Need(1, 0, 4 * GB).tasks_on(found) for found in nodes] == [4, 2]
    assert [Need(1, 1, GB).tasks_on(found) for found in nodes] == [0, 2]
    assert tasks_at_once(nodes, Need(2, 0, GB)) == 2 + 4
    assert Need(2, 1, 5).options() == {"num_cpus": 2, "num_gpus": 1, "memory": 5}


def test_nodes_that_have_left_do_not_count() -> None:
    gone = {**node("10.0.0.3"), "Alive": False}
    assert [found.address for found in nodes_of(FakeRay(node("10.0.0.2"), gone))] == ["10.0.0.2"]


def test_what_fits_nowhere_is_refused() -> None:
    nodes = nodes_of(FakeRay(node("10.0.0.2", 2, 0, GB)))
    check_need(nodes, Need(2, 0, GB), "the largest layer")
    with pytest.raises(OptionError, match=r"^--device cuda: no node of the cluster has a GPU"):
        check_need(nodes, Need(1, 1, GB), "the largest layer")
    expected = (
        r"^the largest layer needs 1 core and 2.0 GB on one node, and no node has that \(10.0.0.2: 2 cores, 1.0 GB"
    )
    with pytest.raises(OptionError, match=expected):
        check_need(nodes, Need(1, 0, 2 * GB), "the largest layer")
