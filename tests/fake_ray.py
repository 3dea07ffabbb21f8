"""A stand-in for Ray in this process: tasks run when they are submitted, one after another.

What is sent is pickled, as between processes. `nodes` may change while tasks run. `lose` decides whether the result of
a task, by its number, is lost as if its process had died.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any


class RayError(Exception):
    """The base class of Ray's errors."""


class ObjectStoreFullError(RayError):
    """No room for a result."""


class OutOfDiskError(RayError):
    """No room on the disk for what was spilled."""


class RayTaskError(RayError):
    """An error of the code of a task."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"a long story about\n{cause}")
        self.cause = cause


class RuntimeEnvSetupError(RayError):
    """Its worker could not be prepared, or its node has left."""


class TaskUnschedulableError(RayError):
    """Its worker could not be prepared, or its node has left."""


class Reference:
    """The result of a task, or its error."""

    def __init__(self, value: bytes = b"", error: Exception | None = None) -> None:
        self.value, self.error, self.counted = value, error, False


class Remote:
    """A function, or a method of an actor, as Ray calls it."""

    def __init__(self, ray: FakeRay, work: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self.ray, self.work, self._options = ray, work, options

    def options(self, **more: Any) -> Remote:
        changed = Remote(self.ray, self.work, {**self._options, **more})
        changed.options = None  # type: ignore[assignment, method-assign]  # Ray takes options once
        return changed

    def remote(self, *arguments: Any) -> Any:
        resolved = [self.ray.get(part) if isinstance(part, Reference) else copied(part) for part in arguments]
        if isinstance(self.work, type):
            self.ray.log.append(("actor", self._options))
            return Actor(self.ray, self.work(*resolved))
        self.ray.log.append((getattr(self.work, "__name__", ""), self._options))
        return self.ray.submit(self.work, resolved)


class Actor:
    """An actor: its methods are called by `.remote`."""

    def __init__(self, ray: FakeRay, made: Any) -> None:
        self._ray, self._made = ray, made

    def __getattr__(self, name: str) -> Remote:
        return Remote(self._ray, getattr(self._made, name), {})


def copied(value: Any) -> Any:
    """A value as another process would get it."""
    return pickle.loads(pickle.dumps(value))


def node(name: str, cores: int = 1, gpus: int = 0, memory: float = 1e12) -> dict[str, Any]:
    """A row of `ray.nodes()`."""
    resources = {"CPU": float(cores), "memory": memory, **({"GPU": float(gpus)} if gpus else {})}
    return {"NodeID": name, "Alive": True, "NodeManagerAddress": name, "Resources": resources}


class FakeRay:
    """The part of the module `ray` that is used. `log` has the name and options of each task that was submitted."""

    def __init__(self, *nodes: dict[str, Any], lose: Callable[[int], Exception | None] = lambda _: None) -> None:
        self.rows = list(nodes) or [node("10.0.0.2", 2)]
        self.lose = lose
        self.log: list[tuple[str, Mapping[str, Any]]] = []
        self.killed: list[Any] = []  # the objects of actors
        self.submitted = self.most = self.held = 0
        self.exceptions = SimpleNamespace(
            RayError=RayError,
            RayTaskError=RayTaskError,
            ObjectStoreFullError=ObjectStoreFullError,
            OutOfDiskError=OutOfDiskError,
            RuntimeEnvSetupError=RuntimeEnvSetupError,
            TaskUnschedulableError=TaskUnschedulableError,
        )
        strategy = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda name, soft: (name, soft))
        self.util = SimpleNamespace(scheduling_strategies=strategy)

    def nodes(self) -> list[dict[str, Any]]:
        return self.rows

    def put(self, value: Any) -> Reference:
        return Reference(pickle.dumps(value))

    def submit(self, work: Callable[..., Any], arguments: Sequence[Any]) -> Reference:
        self.submitted += 1
        self.held += 1
        self.most = max(self.most, self.held)
        reference = Reference(error=self.lose(self.submitted))
        reference.counted = True
        if reference.error is None:
            try:
                reference.value = pickle.dumps(work(*arguments))
            except Exception as error:
                reference.error = RayTaskError(error)
        return reference

    def get(self, what: Any) -> Any:
        if isinstance(what, list):
            return [self.get(part) for part in what]
        self.held -= 1 if what.counted else 0
        if what.error is not None:
            raise what.error
        return pickle.loads(what.value)

    def wait(self, references: Sequence[Reference], **_: Any) -> tuple[list[Reference], list[Reference]]:
        """The last one is done first: nothing may depend on the order."""
        return list(references[-1:]), list(references[:-1])

    def remote(self, *work: Callable[..., Any], **options: Any) -> Any:
        if work:
            return Remote(self, work[0], options)
        return lambda one: Remote(self, one, options)

    def cancel(self, _: Reference, force: bool) -> None:
        assert force

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor._made)
