"""Runs independent, idempotent tasks on a cluster: a few more than fit at a time, and a lost one again.

A task is lost if its process or its node dies before its result is here. It runs again on whatever node has room. A
process that dies again and again on the same task, which is most often one that needs more memory than there is, ends
the run. Nodes that join while tasks run are used.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from loftq import errors
from loftq.cluster.nodes import Need, nodes_of, tasks_at_once
from loftq.display import one_line
from loftq.errors import ClusterError, LoftQError, OptionError

Result = TypeVar("Result")
_MOST_CRASHES = 5  # of one task while all nodes stay
_PATIENCE = 300.0  # seconds to wait while no node of the cluster can run a task


@dataclass(frozen=True)
class Failure:
    """The error of a task: the name of its class, and its message."""

    kind: str
    message: str

    def error(self) -> LoftQError:
        """The same error in this process."""
        kind = getattr(errors, self.kind, LoftQError)
        return OptionError(self.message) if kind is errors.UnknownNameError else kind(self.message)


def failure_of(error: LoftQError) -> Failure:
    """An error of a task as a value that can be sent."""
    return Failure(type(error).__name__, str(error))


class Slots:
    """The number of tasks that the nodes of a cluster run at the same time, at most `most`. Asks once a second."""

    def __init__(self, ray: Any, need: Need, most: int | None) -> None:
        self._ray, self._need, self._most = ray, need, most
        self._asked, self._count, self._left = 0.0, 0, time.monotonic()
        self.nodes: frozenset[str] = frozenset()

    def count(self) -> int:
        """The number now. Raises ClusterError if no node has been there for minutes."""
        now = time.monotonic()
        if now - self._asked >= 1.0:
            nodes = nodes_of(self._ray)
            self.nodes, self._asked = frozenset(node.id for node in nodes), now
            self._count = tasks_at_once(nodes, self._need)
            if self._count:
                self._left = now
            elif now - self._left > _PATIENCE:
                raise ClusterError("no node of the cluster is left that can run a task: run again with --resume")
        return self._count if self._most is None else min(self._count, self._most)

    def room(self) -> int:
        """The number of tasks to submit: some more than run at the same time, so that no worker waits for the next."""
        count = self.count()
        return count + min(count, 8) if self._most is None else count


class _Losses:
    """Counts how often the process of each task died. Those of a node that is gone do not count."""

    def __init__(self, ray: Any, slots: Slots) -> None:
        self._ray, self._slots = ray, slots
        self._counts: Counter[str] = Counter()
        self._nodes: frozenset[str] = frozenset()

    def add(self, name: str, error: Exception) -> None:
        """Note that a task was lost. Raises ClusterError if it would be lost again."""
        explain(self._ray, name, error)
        if not self._nodes <= self._slots.nodes:
            self._counts.clear()
        self._nodes = self._slots.nodes
        self._counts[name] += 1
        if self._counts[name] > _MOST_CRASHES:
            raise ClusterError(
                f"the process that works on {name} died {self._counts[name]} times ({one_line(error, 200)}): "
                "if its memory was full, use fewer --workers, or nodes with more memory"
            ) from error


def run_tasks(
    ray: Any, submit: Callable[[str], Any], names: Sequence[str], done: Callable[[str, Any], None], slots: Slots
) -> None:
    """Run a task for each name. `submit` starts one and returns its reference, `done` gets its result.

    Raises the error of a task that fails for its own fault; the others are stopped then.
    """
    waiting, running, losses = deque(names), dict[Any, str](), _Losses(ray, slots)
    try:
        while waiting or running:
            room = slots.room()
            while waiting and len(running) < room:
                name = waiting.popleft()
                running[submit(name)] = name
            if not running:
                time.sleep(1.0)
                continue
            ready, _ = ray.wait(list(running), timeout=1.0, fetch_local=False)
            for reference in ready:
                name = running.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayError as error:
                    losses.add(name, error)
                    waiting.appendleft(name)
                    continue
                if isinstance(result, Failure):
                    raise result.error()
                done(name, result)
                del result
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def explain(ray: Any, name: str, error: Exception) -> None:
    """Raise ClusterError for an error of Ray that a second try would not cure. Others return."""
    kinds = ray.exceptions
    while isinstance(error, kinds.RayTaskError) and isinstance(error.cause, kinds.RayError):
        error = error.cause  # what the task was given was lost with another process
    if isinstance(error, (kinds.ObjectStoreFullError, kinds.OutOfDiskError)):
        raise ClusterError(
            f"the object store of the cluster is full ({one_line(error, 200)}): let all nodes see the output folder, "
            "use fewer --workers, or start Ray with a larger --object-store-memory"
        ) from error
    if isinstance(error, kinds.RayTaskError):
        cause = error.cause if isinstance(error.cause, Exception) else error
        lines = [line for line in str(cause).splitlines() if line.strip()]
        message = lines[-1].strip() if lines else type(cause).__name__
        advice = ": install the same loftq on all nodes" if isinstance(cause, ImportError) else ""
        raise ClusterError(
            f"{name}: a task of the cluster failed ({type(cause).__name__}: {message}){advice}"
        ) from error
    if isinstance(error, (kinds.RuntimeEnvSetupError, kinds.TaskUnschedulableError)):
        raise ClusterError(f"{name}: the cluster cannot run this task: {one_line(error, 300)}") from error
