"""How a run would scale over GPUs and machines: a simulation of its events, with measured and with assumed rates.

    python benchmarks/cluster_simulation.py [--measure] [--tokens 65536] [--length 2048] [--life 60]

A worker takes one weight at a time: the driver sends the task, the worker reads the weight, solves it, writes the
result, and the driver notes it. Readers and writers share the storage and the link of their node, and each of these
serves one transfer after another; the driver does one thing at a time. While calibrating, all workers run one block
over their windows and wait for each other; then the sums of the block pass from worker to worker, a group of rows at a
time and as many groups at the same time as there are workers, in the same order whatever the number of workers is. They
are written while the next block runs. Of GPUs, at most eight calibrate, on as few nodes as possible.

`--measure` measures the rates of this machine: reading, solving, writing, moving and the driver's share of a task. The
GPU's rate of solving was measured on an H100 (`layer.py`, docs/benchmarks.md); what nobody has measured is marked.
"""

from __future__ import annotations

import argparse
import heapq
import os
import random
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from machine import SEED, describe, table

AWAY = 180.0  # seconds until a node that was taken away is replaced; assumed
AGAIN = (
    60.0  # seconds of calibrating that a loss costs: half of what lies between two notes of the progress, and a start
)
GROUP = 512  # rows of a sum that pass together
IN_FLIGHT = 8  # groups of rows that pass at the same time, at least


@dataclass(frozen=True)
class Model:
    """The shapes of a model of the llama family."""

    name: str
    layers: int
    width: int
    inner: int
    keys: int

    def weights(self) -> Iterator[tuple[int, int]]:
        """The shapes (out, in) of the linears of a layer, the largest first."""
        width, inner = self.width, self.inner
        yield from [(width, inner), (inner, width), (inner, width), (width, width), (width, width)]
        yield from [(self.keys, width)] * 2

    @property
    def size(self) -> int:
        """The number of weights in the linears of a layer."""
        return sum(rows * columns for rows, columns in self.weights())

    @property
    def inputs(self) -> list[int]:
        """The sizes of the inputs of a layer that are summed up: those of q, k, v; of o; of gate, up; of down."""
        return [self.width, self.width, self.width, self.inner]


@dataclass(frozen=True)
class Rates:
    """What a worker, a node, the storage and the driver do in a second (bytes, weights, operations), and seconds."""

    solving: float  # weights
    products: float  # floating-point operations
    store_read: float  # of all nodes together
    store_write: float
    link: float  # of one node
    decompositions: float  # floating-point operations of eigenvalues and triangular solves
    memory: float = 10e9  # assumed: bytes that pass between two processes of a node
    most: int | None = None  # workers that calibrate
    task: float = 0.004  # seconds of the driver for a task
    hop: float = 0.004  # seconds that a group of rows needs beside its bytes
    bytes_read: float = 2.0  # of a weight
    bytes_written: float = 0.55


MODELS = (
    Model("7B", 32, 4096, 11008, 4096),
    Model("70B", 80, 8192, 28672, 1024),
    Model("405B", 126, 16384, 53248, 1024),
)
GPU = Rates(
    solving=541e6,  # measured: 4096 x 4096 in 0.031 s on an H100
    products=200e12,  # assumed: half of what an H100 does in bfloat16
    store_read=5e9,  # assumed: a parallel file system
    store_write=2.5e9,  # assumed
    link=5e9,  # assumed: 40 Gbit/s
    decompositions=10e12,  # assumed: float64 on an H100
    most=8,  # as `loftq.cluster.calibrating` has it for GPUs
)


class Server:
    """Serves one request after another at a rate."""

    def __init__(self, rate: float) -> None:
        self.rate, self.free, self.busy = rate, 0.0, 0.0

    def serve(self, now: float, amount: float) -> float:
        """When a request that comes now is done."""
        taken = amount / self.rate
        self.free = max(now, self.free) + taken
        self.busy += taken
        return self.free


@dataclass
class Spot:
    """Nodes that are taken away at random, `life` seconds after they came on average, and come back `away` seconds
    later: the time at which each node is taken away next.
    """

    life: float
    away: float
    nodes: int

    def __post_init__(self) -> None:
        self._random = random.Random(SEED)
        self._ends = [self._random.expovariate(1 / self.life) for _ in range(self.nodes)]
        self.losses = 0

    def back(self, node: int, now: float) -> float | None:
        """When the node is back, if it was taken away before now; None if it was not."""
        if now < self._ends[node]:
            return None
        self.losses += 1
        back = self._ends[node] + self.away
        self._ends[node] = back + self._random.expovariate(1 / self.life)
        return back


def solve(
    model: Model, nodes: int, workers: int, rates: Rates, *, calibrated: bool, spot: Spot | None = None
) -> tuple[float, str]:
    """The seconds of solving with so many workers on each node, and what was busy the longest, with its share."""
    driver, links = Server(1 / rates.task), [Server(rates.link) for _ in range(nodes)]
    read, written = Server(rates.store_read), Server(rates.store_write)
    tasks = deque(shape for shape in model.weights() for _ in range(model.layers))
    events = [(0.0, worker, "ask", (0, 0)) for worker in range(nodes * workers)]
    ended = solving = 0.0
    while events:  # in the order of time, so that servers see requests as they come
        now, worker, event, (rows, columns) = heapq.heappop(events)
        link, count = links[worker % nodes], rows * columns
        back = spot.back(worker % nodes, now) if spot else None
        if back is not None:  # its task runs again, on whatever node is free
            if event != "ask":
                tasks.appendleft((rows, columns))
            heapq.heappush(events, (max(back, now), worker, "ask", (0, 0)))
        elif event == "ask":
            if tasks:
                heapq.heappush(events, (driver.serve(now, 1), worker, "read", tasks.popleft()))
            elif spot and any(other[2] != "ask" for other in events):  # what another one loses may come back
                heapq.heappush(events, (now + 1.0, worker, "ask", (0, 0)))
        elif event == "read":
            nbytes = count * rates.bytes_read + (2 * columns**2 if calibrated else 0)
            done = max(read.serve(now, nbytes), link.serve(now, nbytes))
            seconds = count / rates.solving + (10 * columns**3 / rates.decompositions if calibrated else 0)
            solving += seconds
            heapq.heappush(events, (done + seconds, worker, "write", (rows, columns)))
        else:
            nbytes = count * rates.bytes_written
            ended = max(written.serve(now, nbytes), link.serve(now, nbytes), ended)
            heapq.heappush(events, (max(written.free, link.free), worker, "ask", (0, 0)))
    shares = {
        "workers": solving / (nodes * workers),
        "reading": read.busy,
        "writing": written.busy,
        "links": max(link.busy for link in links),
        "driver": driver.busy,
    }
    most = max(shares, key=shares.__getitem__)
    return ended, f"{most} {shares[most] / ended:.0%}"


def calibrate(model: Model, nodes: int, workers: int, rates: Rates, tokens: int, length: int) -> tuple[float, str]:
    """The seconds of calibrating, and the part that takes the longest, with its share."""
    used = min(nodes * workers, max(tokens // length, 1), rates.most or nodes * workers)
    nodes = min(nodes, -(-used // workers)) if rates.most else min(nodes, used)
    share = -(-(tokens // length) // used) * length  # tokens of the worker that has the most
    reading = model.size * rates.bytes_read / min(rates.store_read / nodes, rates.link)
    computing = (2 * model.size + sum(2 * size**2 for size in model.inputs)) * share / rates.products
    passing = 0.0
    for size in model.inputs:
        groups = [(size - start) * min(GROUP, size - start) * 8 for start in range(0, size, GROUP)]
        hops = [rates.hop + nbytes / (rates.link if nodes > 1 else rates.memory) for nbytes in groups]
        chains = sum(hops) * used / min(max(IN_FLIGHT, used), len(groups), used)
        passing += max(chains, sum(groups) / rates.link)
    writing = sum(2 * size**2 for size in model.inputs) / min(rates.store_write, rates.link)
    parts = {"reading": reading, "computing": computing, "sums": passing, "writing": writing}
    most = max(parts, key=parts.__getitem__)
    total = max(reading + computing + passing, writing)  # the sums are written while the next block runs
    return total * model.layers, f"{most} {parts[most] / total:.0%}"


def best(model: Model, rates: Rates, workers: int, tokens: int, length: int) -> None:
    """Print the times on 1 to 64 nodes with so many workers each."""
    rows: list[tuple[str, ...]] = [
        (
            f"{model.name}: nodes x GPUs",
            "LoftQ",
            "",
            "busiest",
            "calibrated",
            "",
            "busiest",
            "statistics",
            "",
            "longest",
        )
    ]
    first: list[float] = []
    for nodes, each in [(1, 1), (1, workers)] + [(2**i, workers) for i in range(1, 7)]:
        parts = [solve(model, nodes, each, rates, calibrated=done) for done in (False, True)]
        parts.append(calibrate(model, nodes, each, rates, tokens, length))
        first = first or [seconds for seconds, _ in parts]
        cells = [
            text
            for (seconds, busy), alone in zip(parts, first, strict=True)
            for text in (duration(seconds), f"{alone / seconds:.1f}x", busy)
        ]
        rows.append((f"{nodes} x {each}", *cells))
    print(f"{table(rows)}\n")


def lost(model: Model, rates: Rates, nodes: int, minutes: float, tokens: int, length: int) -> None:
    """Print the times on nodes of one GPU that are taken away, and on the same nodes that are not."""
    rows: list[tuple[str, ...]] = [(f"{model.name}: {nodes} nodes x 1 GPU", "LoftQ", "calibrated", "statistics")]
    statistics = calibrate(model, nodes, 1, rates, tokens, length)[0]
    kept = [solve(model, nodes, 1, rates, calibrated=done)[0] for done in (False, True)]
    rows.append(("all stay", *map(duration, (*kept, statistics))))
    spots = [Spot(60 * minutes, AWAY, nodes) for _ in range(2)]
    found = [solve(model, nodes, 1, rates, calibrated=bool(i), spot=spot)[0] for i, spot in enumerate(spots)]
    every = 60 * minutes / min(nodes, rates.most or nodes)  # seconds between two losses of a node that calibrates
    again = statistics / max(1 - AGAIN / every, 0.01)
    losses = f"each lives {minutes:.0f} min: {spots[0].losses}, {spots[1].losses}, {again / every:.0f} losses"
    rows.append((losses, *map(duration, (*found, again))))
    print(f"{table(rows)}\n")


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def measured() -> Rates:
    """The rates of this machine: one core, its disk, and Ray between two nodes of this machine."""
    size = 1 << 28
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "bytes"
        data = os.urandom(1 << 24)
        begin = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(size >> 24):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        writing = size / (time.perf_counter() - begin)
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        while os.read(descriptor, 1 << 24):
            pass
        reading = size / (time.perf_counter() - begin)
        os.close(descriptor)
    solving, products = _core()
    moving, task = _ray()
    print(
        f"this machine: reading {reading / 1e6:.0f} MB/s, writing {writing / 1e6:.0f} MB/s, moving between nodes of "
        f"Ray {moving / 1e6:.0f} MB/s; one core solves {solving / 1e6:.2f} million weights a second and computes "
        f"{products / 1e9:.0f} G operations; the driver needs {1000 * task:.1f} ms for a task\n"
    )
    return Rates(solving, products, reading, writing, moving, products / 2, task=task, hop=task)


def _core() -> tuple[float, float]:
    from loftq.cluster.estimate import Sample, rates_task
    from loftq.cluster.tasks import Failure
    from loftq.core.grid import Grid
    from loftq.planning.recipe import recipe_of

    sample = Sample(512, 1024, recipe_of(bits=4, rank=16), Grid("nf4", 64).decoder(1024), "cpu")
    found = rates_task(sample)
    if isinstance(found, Failure):
        raise SystemExit(found.message)
    return found


def _ray() -> tuple[float, float]:
    """Bytes that move from one node to another in a second, and the seconds of an empty task."""
    from ray.cluster_utils import Cluster

    from loftq.cluster.connection import connected

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        with connected(cluster.address) as ray:
            make = ray.remote(lambda: np.zeros(1 << 26, dtype=np.uint8))
            empty = ray.remote(lambda: None)
            ray.get(empty.remote())
            begin = time.perf_counter()
            for _ in range(100):
                ray.get(empty.remote())
            task = (time.perf_counter() - begin) / 100
            waiting = [make.remote() for _ in range(3)]
            ray.wait(waiting, num_returns=3, fetch_local=False)
            begin = time.perf_counter()
            for reference in waiting:
                ray.get(reference)
            return 3 * (1 << 26) / (time.perf_counter() - begin), task
    finally:
        cluster.shutdown()


def main() -> None:
    """Simulate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--measure", action="store_true", help="measure this machine, and simulate nodes like it")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--store", type=float, help="GB/s that the storage reads for all nodes; it writes half of that")
    parser.add_argument("--link", type=float, help="GB/s of the link of a node")
    parser.add_argument("--life", type=float, default=60.0, help="minutes until a spot node is taken away, on average")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rates = GPU
    if options.store:
        rates = replace(rates, store_read=options.store * 1e9, store_write=options.store * 5e8)
    if options.link:
        rates = replace(rates, link=options.link * 1e9)
    if options.measure:
        best(MODELS[0], measured(), 2, options.tokens, options.length)
    for model in MODELS[1:]:
        best(model, rates, 8, options.tokens, options.length)
        lost(model, rates, 16, options.life, options.tokens, options.length)
    print(f"{options.tokens} tokens in windows of {options.length}; of a GPU: {rates}")
    print(describe("cpu"))


if __name__ == "__main__":
    main()
