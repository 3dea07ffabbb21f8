"""The rates of the workers of a cluster, as they stand beside the progress bar."""

from __future__ import annotations

from tqdm import tqdm

_MOST_NODES = 3  # that are shown one by one


class Rates:
    """What each worker has done, counted in a `unit`, and the seconds that it needed."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._done: dict[tuple[str, int], tuple[float, float]] = {}

    def add(self, node: str, worker: int, amount: float, seconds: float) -> None:
        """Note what a worker has done."""
        before, spent = self._done.get((node, worker), (0.0, 0.0))
        self._done[node, worker] = before + amount, spent + seconds

    def __str__(self) -> str:
        """The number of workers of each node, and the rate of one of them."""
        nodes: dict[str, list[float]] = {}
        for (address, _), (amount, seconds) in self._done.items():
            nodes.setdefault(address, []).append(amount / seconds if seconds else 0.0)
        if len(nodes) > _MOST_NODES:
            rates = [rate for found in nodes.values() for rate in found]
            return f"{len(rates)} workers on {len(nodes)} nodes, {self._shown(rates)} each"
        return ", ".join(f"{address}: {len(rates)} x {self._shown(rates)}" for address, rates in nodes.items())

    def _shown(self, rates: list[float]) -> str:
        return f"{tqdm.format_sizeof(sum(rates) / len(rates))}{self._unit}/s"
