"""Tasks run again when their process dies, and a task that fails for its own fault ends the run with one line.

Covers: loftq/cluster/tasks.py.
"""

from __future__ import annotations

import importlib
from typing import Any

import fake_ray
import pytest
from fake_ray import FakeRay, node

from loftq.cluster.nodes import Need
from loftq.cluster.tasks import Failure, Slots, failure_of, run_tasks
from loftq.errors import ClusterError, OptionError, SourceError, UnknownNameError

NAMES = [f"task {number}" for number in range(40)]


def doubled(name: str) -> str:
    return name * 2


def collect(ray: FakeRay, work: Any = doubled, names: list[str] = NAMES, most: int | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    remote = ray.remote(work)
    run_tasks(ray, remote.remote, names, found.__setitem__, Slots(ray, Need(1, 0, 0), most))
    return found


def test_every_task_runs_once() -> None:
    """Oracle: the function itself, called in this process."""
    ray = FakeRay(node("a", 2), node("b", 1))
    assert collect(ray) == {name: doubled(name) for name in NAMES}
    assert ray.submitted == len(NAMES)


def test_no_more_tasks_are_submitted_than_fit() -> None:
    ray = FakeRay(node("a", 2), node("b", 1))
    collect(ray)
    assert ray.most == 2 * 3  # one more for each worker, so that none of them waits
    limited = FakeRay(node("a", 8))
    collect(limited, most=2)
    assert limited.most == 2


LOST = fake_ray.RayError("its worker died")


@pytest.mark.parametrize("error", [LOST, fake_ray.RayTaskError(LOST)], ids=["itself", "its input"])
def test_a_lost_task_runs_again(error: Exception) -> None:
    ray = FakeRay(lose=lambda number: error if number % 3 == 0 else None)
    assert collect(ray) == {name: doubled(name) for name in NAMES}
    assert ray.submitted > len(NAMES)


def test_a_task_whose_process_dies_again_and_again_ends_the_run() -> None:
    ray = FakeRay(lose=lambda _: fake_ray.RayError("killed: out of memory\nand many lines more"))
    with pytest.raises(ClusterError, match=r"^the process that works on task 0 died 6 times \(.*\): if its memory was"):
        collect(ray, names=["task 0"])
    assert ray.submitted == 6


def test_the_error_of_a_task_is_the_error_of_the_run() -> None:
    ray = FakeRay()
    with pytest.raises(SourceError, match=r"^tensor 'w' has NaN$"):
        collect(ray, lambda _: Failure("SourceError", "tensor 'w' has NaN"))
    with pytest.raises(ClusterError, match=r"^task 0: a task of the cluster failed \(KeyError: 'task 0'\)$"):
        collect(ray, {}.__getitem__, ["task 0"])
    with pytest.raises(ClusterError, match=r"No module named 'no_such'\): install the same loftq on all nodes$"):
        collect(ray, lambda _: importlib.import_module("no_such"), ["task 0"])


@pytest.mark.parametrize("kind", [fake_ray.ObjectStoreFullError, fake_ray.OutOfDiskError])
def test_a_full_object_store_is_named(kind: type[Exception]) -> None:
    ray = FakeRay(lose=lambda _: kind("no room"))
    with pytest.raises(ClusterError, match=r"the object store of the cluster is full .*--object-store-memory$"):
        collect(ray)
    assert ray.submitted < len(NAMES)


def test_errors_keep_their_class() -> None:
    assert type(failure_of(SourceError("no")).error()) is SourceError
    unknown = failure_of(UnknownNameError("method", "lofq", ["loftq"]))
    assert type(unknown.error()) is OptionError
    assert "lofq" in str(unknown.error())


def test_nodes_that_join_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(node("a", 1))
    slots = Slots(ray, Need(1, 0, 0), None)
    assert slots.count() == 1
    ray.rows = [node("a", 1), node("b", 4)]
    assert slots.count() == 1  # asked a moment ago
    monkeypatch.setattr(slots, "_asked", 0.0)
    assert slots.count() == 5
    assert slots.nodes == {"a", "b"}


def test_a_cluster_without_nodes_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(node("a", 1))
    slots = Slots(ray, Need(1, 0, 0), None)
    ray.rows = []
    monkeypatch.setattr(slots, "_left", slots._left - 1000)
    with pytest.raises(ClusterError, match=r"no node of the cluster is left .*--resume$"):
        slots.count()
