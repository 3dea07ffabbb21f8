"""The nodes of a cluster, and what fits on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loftq.display import size
from loftq.errors import OptionError

PROCESS_BYTES = 600_000_000  # of a worker that has imported torch and transformers


@dataclass(frozen=True)
class Node:
    """A machine, or a part of one: its id in Ray, its address, and what tasks may use of it."""

    id: str
    address: str
    cores: int
    gpus: int
    memory: int

    def __str__(self) -> str:
        gpus = f", {self.gpus} GPU{'s' if self.gpus > 1 else ''}" if self.gpus else ""
        return f"{self.address}: {_cores(self.cores)}{gpus}, {size(self.memory)}"


@dataclass(frozen=True)
class Need:
    """What a task asks for: whole cores, whole GPUs, and bytes of memory."""

    cores: int = 1
    gpus: int = 0
    memory: int = PROCESS_BYTES

    def options(self) -> dict[str, Any]:
        """The same as options of a task of Ray."""
        return {"num_cpus": self.cores, "num_gpus": self.gpus, "memory": self.memory}

    @classmethod
    def largest(cls, needs: Sequence[Need]) -> Need:
        """What is enough for each of several tasks."""
        return cls(*(max(getattr(need, name) for need in needs) for name in ("cores", "gpus", "memory")))

    def tasks_on(self, node: Node) -> int:
        """The number of such tasks that a node runs at the same time."""
        shares = [node.memory // self.memory if self.memory else 2**31]
        shares += [node.cores // self.cores] if self.cores else []
        shares += [node.gpus // self.gpus] if self.gpus else []
        return min(shares)


def nodes_of(ray: Any) -> list[Node]:
    """The nodes that are alive, by address."""
    found = []
    for entry in ray.nodes():
        if entry["Alive"]:
            resources = entry["Resources"]
            amounts = [int(resources.get(name, 0)) for name in ("CPU", "GPU", "memory")]
            found.append(Node(entry["NodeID"], entry["NodeManagerAddress"], *amounts))
    return sorted(found, key=lambda node: (node.address, node.id))


def tasks_at_once(nodes: Sequence[Node], need: Need) -> int:
    """The number of tasks that all nodes run at the same time."""
    return sum(need.tasks_on(node) for node in nodes)


def check_need(nodes: Sequence[Node], need: Need, what: str) -> None:
    """Raise OptionError if no node has what a task asks for: Ray would wait for such a node forever."""
    if tasks_at_once(nodes, need):
        return
    if need.gpus and not any(node.gpus >= need.gpus for node in nodes):
        raise OptionError("--device cuda: no node of the cluster has a GPU: use --device cpu, or add a node with one")
    shown = "; ".join(map(str, nodes[:4]))
    raise OptionError(
        f"{what} needs {_cores(need.cores)} and {size(need.memory)} on one node, and no node has that ({shown}): add a "
        "larger node, or start Ray on it with a larger --memory"
    )


def _cores(count: int) -> str:
    return f"{count} core{'s' if count != 1 else ''}"
