"""The rates of the workers of a cluster, as they stand beside the progress bar."""

from __future__ import annotations

from collections.abc import Mapping

from tqdm import tqdm

_MOST_NODES = 3  # that are shown one by one


class Rates:
    """The values that each worker has solved, and the seconds that it needed. `sizes` are the values of each task."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        self._solved: dict[tuple[str, int], tuple[int, float]] = {}

    def add(self, name: str, node: str, worker: int, seconds: float) -> str:
        """Note a task that a worker has done. Returns the workers of each node with the rate of one of them."""
        values, spent = self._solved.get((node, worker), (0, 0.0))
        self._solved[node, worker] = values + self._sizes.get(name, 0), spent + seconds
        nodes: dict[str, list[float]] = {}
        for (address, _), (solved, needed) in self._solved.items():
            nodes.setdefault(address, []).append(solved / needed if needed else 0.0)
        if len(nodes) > _MOST_NODES:
            rates = [rate for found in nodes.values() for rate in found]
            return f"{len(rates)} workers on {len(nodes)} nodes, {_shown(rates)} each"
        return ", ".join(f"{address}: {len(rates)} x {_shown(rates)}" for address, rates in nodes.items())


def _shown(rates: list[float]) -> str:
    return f"{tqdm.format_sizeof(sum(rates) / len(rates))}w/s"
