"""Runs on Ray itself: two nodes of one core on this machine, of which some are killed.

The oracle is `loftq.quantize` without a cluster to the same path: the SHA-256 of every file. Skipped without Ray.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pico_llama, save_model
from folders import Files, hashes

import loftq
from loftq.artifacts.staging import Staging, is_begun
from loftq.calibration.progress import Progress
from loftq.cluster import spread
from loftq.cluster.rates import Rates

pytestmark = [
    pytest.mark.skipif(not all(map(find_spec, ("ray", "threadpoolctl"))), reason="needs Ray"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of Ray itself
]
CALIBRATED: dict[str, Any] = {"calibration_tokens": 16384, "sequence_length": 128, "refine": 0}
Quantize = Callable[..., Files]


class TwoNodes:
    """A head without cores, and nodes of one core. `nodes` are those that have been added."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = [self.add(), self.add()]

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=1, wait=True)

    def kill(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoNodes]:
    monkeypatch.setattr(spread, "LEAST_VALUES", 1)  # small layers are tasks of their own
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    nodes = TwoNodes()
    yield nodes
    nodes.cluster.shutdown()


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A model with layers enough that there is time to kill something."""
    return save_model(pico_llama(num_hidden_layers=6, hidden_size=256, intermediate_size=512), tmp_path / "deep")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"Line {number} tells of a fox, a dog and a quick jump." for number in range(2000)))
    return path


@pytest.fixture
def quantize(deep: Path, text: Path, tmp_path: Path) -> Quantize:
    """Quantize to the same paths. Returns the hashes of the folder, and of the statistics."""

    def run(cluster: str | None = None, **settings: Any) -> Files:
        for name in ("out", "statistics"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        options = {"rank": 16, "iters": 5, "output": tmp_path / "out", "statistics": tmp_path / "statistics"}
        options |= {"calibration": str(text), **CALIBRATED, **settings}
        loftq.quantize(str(deep), cluster=cluster, **options)
        return {**hashes(tmp_path / "out"), **hashes(tmp_path / "statistics")}

    return run


def command_of(nodes: TwoNodes, folder: Path, text: Path) -> list[str]:
    """The command that does what `quantize` does on a cluster."""
    words = ["quantize", str(folder / "deep"), "--cluster", nodes.address, "--output", str(folder / "out")]
    words += ["--rank", "16", "--iter", "5", "--calibration", str(text), "--calibration-tokens", "16384"]
    words += ["--sequence-length", "128", "--refine", "0", "--statistics", str(folder / "statistics")]
    return [sys.executable, "-m", "loftq", *words]


def after(count: int, owner: type, name: str, action: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something after a method was called so many times, with the arguments of that call."""
    calls, method = [0], getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        calls[0] += 1
        if calls[0] == count:
            action(*args)
        return result

    monkeypatch.setattr(owner, name, counted)


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def test_two_nodes_give_the_same_bytes(two_nodes: TwoNodes, quantize: Quantize) -> None:
    assert quantize(two_nodes.address) == quantize()


def test_a_node_that_dies_costs_only_its_tasks(
    two_nodes: TwoNodes, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One dies while the model is calibrated, the other while it is solved. A third has joined by then."""
    here = quantize()
    after(3, Progress, "end", lambda *_: two_nodes.kill(two_nodes.nodes[0]), monkeypatch)
    after(5, Progress, "end", lambda *_: two_nodes.nodes.append(two_nodes.add()), monkeypatch)
    after(8, Staging, "note", lambda *_: two_nodes.kill(two_nodes.nodes.pop(1)), monkeypatch)
    assert quantize(two_nodes.address) == here
    assert len(two_nodes.nodes) == 2  # of three


def test_a_worker_that_dies_loses_its_task_only(
    two_nodes: TwoNodes, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = quantize()
    killed: list[int] = []

    def kill(*args: Any) -> None:
        os.kill(args[3], signal.SIGKILL)
        killed.append(args[3])

    after(6, Rates, "add", kill, monkeypatch)
    assert quantize(two_nodes.address) == here
    assert len(killed) == 1


def test_a_node_that_joins_is_used(two_nodes: TwoNodes, quantize: Quantize, monkeypatch: pytest.MonkeyPatch) -> None:
    here = quantize()
    two_nodes.kill(two_nodes.nodes.pop())
    raylets: set[int] = set()
    add = Rates.add

    def noted(*args: Any) -> None:
        raylets.add(parent_of(args[2]))
        add(*args)

    monkeypatch.setattr(Rates, "add", noted)
    after(2, Progress, "end", lambda *_: two_nodes.nodes.append(two_nodes.add()), monkeypatch)
    assert quantize(two_nodes.address) == here
    assert len(raylets) == 2


def test_a_driver_that_dies_resumes(two_nodes: TwoNodes, quantize: Quantize, tmp_path: Path, text: Path) -> None:
    here = quantize()
    shutil.rmtree(tmp_path / "out")
    words = [*command_of(two_nodes, tmp_path, text), "--resume"]
    journal = tmp_path / "out" / ".loftq-partial" / "journal.jsonl"
    with subprocess.Popen(words) as driver:
        while driver.poll() is None and (not journal.is_file() or journal.read_bytes().count(b"tensor") < 4):
            time.sleep(0.1)
        driver.kill()
    assert is_begun(tmp_path / "out")
    assert subprocess.run(words, check=False).returncode == 0
    assert {**hashes(tmp_path / "out"), **hashes(tmp_path / "statistics")} == here


def test_a_damaged_weight_is_one_line(two_nodes: TwoNodes, tmp_path: Path) -> None:
    model = pico_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    broken = save_model(model, tmp_path / "broken")
    words = ["quantize", str(broken), "--cluster", two_nodes.address, "--output", str(tmp_path / "out"), "--quiet"]
    done = subprocess.run([sys.executable, "-m", "loftq", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "model.layers.1.mlp.up_proj.weight" in done.stderr


def test_nodes_die_at_ten_random_moments(two_nodes: TwoNodes, quantize: Quantize, tmp_path: Path, text: Path) -> None:
    """Each time another node joins. Up to two deaths in a run, and each run has the bytes of this process."""
    here = quantize()
    moments, deaths = random.Random(0), 0
    words = command_of(two_nodes, tmp_path, text)
    while deaths < 10:
        for name in ("out", "statistics"):
            shutil.rmtree(tmp_path / name)
        with subprocess.Popen(words) as driver:
            for _ in range(2):
                try:
                    driver.wait(moments.uniform(5.0, 30.0))
                except subprocess.TimeoutExpired:
                    two_nodes.kill(two_nodes.nodes.pop(moments.randrange(2)))
                    two_nodes.nodes.append(two_nodes.add())
                    deaths += 1
        assert driver.returncode == 0
        assert {**hashes(tmp_path / "out"), **hashes(tmp_path / "statistics")} == here
