"""What a step of the distillation takes: processor time, and the peak memory of the process, beside keeping everything.

    OMP_NUM_THREADS=1 python benchmarks/refining.py [MODEL] [--rank 16] [--length 2048] [--steps 4] [--repeats 2]

LoftQ's start at NF4 learns answers that are random, on which neither time nor memory depends. Each run in a process of
its own, by turns: as `loftq quantize` does it, and with all activations kept for the backward pass.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import describe, table

TEXT = Path(__file__).parent / "data" / "shakespeare.txt"
WINDOWS = 32  # as many as 65,536 tokens are
WAYS = {"kept": "all activations kept", "ours": "loftq quantize"}


def teacher(folder: str, length: int) -> dict[str, torch.Tensor]:
    """Windows of a text, with answers that are random."""
    from transformers import AutoTokenizer

    from loftq.calibration.observer import TOP

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = TEXT.read_text(encoding="utf-8")[: 6 * WINDOWS * length]  # tokenizing more would be the peak
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // length * length].view(-1, length)[:WINDOWS]
    indices = torch.randint(len(tokenizer), (*windows.shape, TOP), generator=torch.Generator().manual_seed(0))
    values = torch.full(indices.shape, -6.0, dtype=torch.float16)
    return {"input_ids": windows.int(), "values": values, "indices": indices.int()}


def run(way: str, folder: str, options: argparse.Namespace) -> None:
    """Refine, and print the processor time of a step and the peak memory."""
    from contextlib import nullcontext

    from loftq.formats.artifact import read_artifact
    from loftq.solving import divergence, refine

    if way == "kept":
        divergence.keeping_less = lambda *_, **__: nullcontext()  # type: ignore[assignment]
    began: list[float] = []
    original = refine._Distiller.compute_loss

    def timed(*arguments: Any, **named: Any) -> torch.Tensor:
        began.append(time.process_time())
        return original(*arguments, **named)

    refine._Distiller.compute_loss = timed  # type: ignore[method-assign]
    answers = teacher(folder, options.length)
    cpu = torch.device("cpu")
    refine._divergence = lambda *_: 1.0  # measured before and after the steps, which are what counts here
    refine.refine(read_artifact(folder), answers, options.steps, cpu, seed=0, quiet=True)
    steps = [after - before for before, after in itertools.pairwise(began)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": median(steps), "peak": peak}))


def main() -> None:
    """Run both by turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--run", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(options.run, options.model, options)
        return
    import loftq

    with tempfile.TemporaryDirectory() as scratch:
        folder = loftq.quantize(options.model, rank=options.rank, output=f"{scratch}/made", quiet=True).folder
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        words = ["--length", str(options.length), "--steps", str(options.steps)]
        environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}  # as the command line sets it
        for _ in range(options.repeats):
            for way, runs in found.items():
                command = [sys.executable, __file__, str(folder), "--run", way, *words]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
    rows: list[tuple[str, ...]] = [("", "processor time of a step", "peak memory")]
    for way, runs in found.items():
        seconds, peak = (median(each[name] for each in runs) for name in ("seconds", "peak"))
        rows.append((WAYS[way], f"{seconds:.1f} s", f"{peak / 1e9:.2f} GB"))
    print(f"\na window of {options.length} tokens a step, NF4, rank {options.rank}; {describe()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
