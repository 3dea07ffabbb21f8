"""Ray against threads: the time of calibrating and of solving with one and with two cores, and whether bytes agree.

    python benchmarks/cluster.py [MODEL ...] [--layers 3] [--skip-model] [--tokens 16384] [--length 512] [--iters 5]
                                 [--repeats 5] [--rounds 1] [--modes MODE ...]

For each model processes work one after another: threads of one process with 1 and with 2 cores, Ray with 2 workers of
one core each on one node, as `--cluster auto` starts it, and on two nodes of this machine (`ray.cluster_utils`). The
models are those given (by default the installed SmolLM2-135M), and a synthetic checkpoint with so many layers of
Llama-2-7B's shapes. Two processes of one core that do all of the work at the same time, each for itself (`apart`), show
what is to be had: their speed-up is what two cores of this machine give to programs that never wait for each other.

What Ray needs to start is left out: the model is quantized once before, so that workers have imported everything, and
calibrating is timed from the end of the first block to the end of the last. Solving is timed as a whole, and takes the
median of `--repeats` runs, with text a single one. CPU seconds are those of all processes in that time. The SHA-256 of
the folder and of the statistics must be those of one thread.

All modes run once in each of `--rounds`, and are compared within a round, since a machine is not as fast at every time.
Printed are medians of the rounds, and for the speed-up the lowest and the highest too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import psutil
import torch
from machine import describe, table
from memory import config_of, make_checkpoint


class Mode(NamedTuple):
    """A way to use `cores`: threads of so many processes, each for itself, or workers on so many nodes of Ray."""

    name: str
    cores: int
    processes: int = 1
    nodes: int = 0


MODES = (
    Mode("threads", 1),
    Mode("apart", 2, processes=2),
    Mode("threads", 2),
    Mode("Ray, 1 node", 2, nodes=1),
    Mode("Ray, 2 nodes", 2, nodes=2),
)


class _EnoughError(Exception):
    """Ends a run after its calibration."""


class _Clock:
    """The wall time and the CPU seconds between two moments, of this process and of all that it has started."""

    def __init__(self) -> None:
        self.first: tuple[float, float] | None = None
        self.last = (0.0, 0.0)

    def tick(self) -> None:
        """Note this moment, the first or the last one so far."""
        here, spent = psutil.Process(), 0.0
        for process in (here, *here.children(recursive=True)):
            try:
                times = process.cpu_times()
            except psutil.Error:
                continue
            spent += times.user + times.system
        self.last = time.perf_counter(), spent
        self.first = self.first or self.last

    def spent(self) -> list[float]:
        """Seconds of the wall and of the CPUs."""
        first = self.first or self.last
        return [after - before for before, after in zip(first, self.last, strict=True)]


def _solve(model: str | None, settings: dict[str, Any], output: Path) -> dict[str, Any]:
    """Quantize. The time is that of the jobs."""
    import loftq
    from loftq.verbs import quantize

    clock, solve_all = _Clock(), quantize.solve_all

    def timed(*args: Any, **kwargs: Any) -> Any:
        clock.tick()
        result = solve_all(*args, **kwargs)
        clock.tick()
        return result

    with patch.object(quantize, "solve_all", timed):
        loftq.quantize(model, output=output, quiet=True, **settings)
    found = {"spent": clock.spent(), "sha256": _hash(output)}
    shutil.rmtree(output)
    return found


def _calibrate(model: str | None, settings: dict[str, Any], output: Path) -> dict[str, Any]:
    """Gather statistics. The time is that of all blocks but the first."""
    import loftq
    from loftq.calibration.progress import Progress
    from loftq.verbs import quantize

    clock, end = _Clock(), Progress.end

    def ended(*args: Any) -> None:
        end(*args)
        clock.tick()

    stopped = patch.object(quantize, "solve_all", side_effect=_EnoughError)
    with patch.object(Progress, "end", ended), stopped, suppress(_EnoughError):
        loftq.quantize(model, output=output, quiet=True, **settings)
    shutil.rmtree(output)
    return {"spent": clock.spent(), "sha256": _hash(settings["statistics"])}


def _hash(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and ".loftq-partial" not in path.parts):
        total.update(path.relative_to(folder).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def work(task: dict[str, Any]) -> None:
    """What one process does: print its measurements as JSON."""
    mode, scratch = Mode(*task["mode"]), Path(task["scratch"])
    cluster, more = None, {"workers": mode.cores // mode.processes}
    torch.set_num_threads(_threads(mode))
    if mode.nodes:
        from ray.cluster_utils import Cluster

        store = int(0.3 * psutil.virtual_memory().total) // mode.nodes  # as with `ray start`, instead of 0.15 GB
        each = {"num_cpus": mode.cores // mode.nodes, "object_store_memory": store}
        cluster = Cluster(initialize_head=True, head_node_args={**each, "include_dashboard": False})
        for _ in range(mode.nodes - 1):
            cluster.add_node(**each)
        cluster.wait_for_nodes()
        more = {"cluster": cluster.address}
    solving = {**task["solving"], **more, "device": "cpu"}
    calibrating = {**task["calibrating"], **more, "device": "cpu"}
    from loftq.cluster.connection import connected

    try:
        with connected(cluster.address) if cluster else nullcontext():
            _solve(task["model"], solving, scratch / "out")
            solved = [_solve(task["model"], solving, scratch / "out") for _ in range(task["repeats"])]
            found = {"solving": sorted(solved, key=lambda one: one["spent"])[len(solved) // 2]}
            if task["tokens"]:
                calibrating |= {"statistics": scratch / "statistics", "refine": 0}
                found["calibrating"] = _calibrate(task["model"], calibrating, scratch / "out")
                found["solving with text"] = _solve(task["model"], calibrating, scratch / "out")
                shutil.rmtree(scratch / "statistics")
    finally:
        if cluster is not None:
            cluster.shutdown()
    print(json.dumps(found))


def _threads(mode: Mode) -> int:
    """The number of threads of a process for matrix products."""
    return 1 if mode.nodes else mode.cores // mode.processes


def _started(task: dict[str, Any], mode: Mode, number: int) -> subprocess.Popen[str]:
    """A process that does a task in a folder of its own."""
    scratch = Path(task["scratch"]) / str(number)
    scratch.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(_threads(mode)),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "THP_MEM_ALLOC_ENABLE": "1",  # as the command line sets it
    }
    command = [sys.executable, __file__, "--task", json.dumps({**task, "mode": mode, "scratch": str(scratch)})]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def _ended(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a process has measured."""
    output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors[-3000:])
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def measure(name: str, model: str | None, scratch: str, tokens: int, options: argparse.Namespace) -> None:
    """Measure a model in all modes, and print a table."""
    name = f"{name}, {tokens} tokens" if tokens else name
    shared = {"bits": 4, "rank": options.rank}
    task: dict[str, Any] = {"model": model, "scratch": scratch, "repeats": options.repeats, "tokens": tokens}
    task["solving"] = {**shared, "iters": options.iters}
    task["calibrating"] = {
        **shared,
        "calibration": options.data,
        "calibration_tokens": tokens,
        "sequence_length": options.length,
    }
    modes = [mode for mode in MODES if mode.name in ("threads", *options.modes)]
    rounds = [_round(task, modes) for _ in range(options.rounds)]
    for part in ("calibrating", "solving", "solving with text") if tokens else ("solving",):
        rows: list[tuple[str, ...]] = [
            (f"{name}: {part}", "cores", "time", "speed-up", "of threads", "CPU time", "bytes")
        ]
        measured = [{mode: found[part] for mode, found in results.items()} for results in rounds]
        rows += [_row(mode, measured) for mode in modes]
        print(f"{table(rows)}\n", flush=True)


def _round(task: dict[str, Any], modes: list[Mode]) -> dict[Mode, dict[str, Any]]:
    """What each mode measures, one after another. Of processes apart, the slowest counts."""
    results = {}
    for mode in modes:
        processes = [_started(task, mode, i) for i in range(mode.processes)]
        ended = [_ended(process) for process in processes]
        results[mode] = max(ended, key=lambda one: sum(part["spent"][0] for part in one.values()))
    return results


def _row(mode: Mode, rounds: list[dict[Mode, dict[str, Any]]]) -> tuple[str, ...]:
    """A mode's row of a table, from what the rounds have measured in all modes."""
    alone, beside = Mode("threads", 1), Mode("threads", mode.cores)
    walls, spent = zip(*(results[mode]["spent"] for results in rounds), strict=True)
    ups = [mode.processes * results[alone]["spent"][0] / results[mode]["spent"][0] for results in rounds]
    of_threads = [results[mode]["spent"][0] / results[beside]["spent"][0] for results in rounds]
    same = all(results[mode]["sha256"] == results[alone]["sha256"] for results in rounds)
    return (
        mode.name,
        str(mode.cores),
        f"{median(walls):.1f} s",
        f"{median(ups):.2f}x" + (f" ({min(ups):.2f} to {max(ups):.2f})" if len(ups) > 1 else ""),
        f"{median(of_threads):.2f}x",
        f"{median(spent):.1f} s",
        ("same" if same else "differ") if mode.processes == 1 else "",
    )


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="*", help="[default: the installed SmolLM2-135M]")
    parser.add_argument("--skip-model", action="store_true", help="only the synthetic checkpoint")
    parser.add_argument("--layers", type=int, default=3, help="of Llama-2-7B's shapes; 0 leaves them out")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--iters", type=int, default=5)
    parser.add_argument("--data", default="default")
    parser.add_argument("--tokens", type=int, default=16384, help="to calibrate on; with 0, only solving is measured")
    parser.add_argument("--shapes-tokens", type=int, default=4096, help="the same for the synthetic checkpoint")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5, help="of solving")
    parser.add_argument("--rounds", type=int, default=1, help="of all modes")
    names = [mode.name for mode in MODES if mode.name != "threads"]
    parser.add_argument("--modes", nargs="*", choices=names, default=names, help="what to compare with threads")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        work(options.task)
        return
    with tempfile.TemporaryDirectory() as scratch:
        for model in options.model or ([] if options.skip_model else [None]):
            measure(Path(model or "SmolLM2-135M").name, model, scratch, options.tokens, options)
        if options.layers:
            config = config_of(options.layers, mixture=False)
            shapes = str(make_checkpoint(Path(scratch) / "llama-2-7b-shapes", config, "cpu"))
            name = f"Llama-2-7B's shapes, {options.layers} layers"
            measure(name, shapes, scratch, options.shapes_tokens, options)
    print(f"windows of {options.length}, rank {options.rank}, {options.iters} iterations")
    print(f"{describe('cpu')}")


if __name__ == "__main__":
    main()
