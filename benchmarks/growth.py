"""The time a tensor takes, in files of 500 to 16,000 tensors: it must not grow with their number.

    python benchmarks/growth.py [--tensors 500 4000 16000] [--repeats 3] [--profile quantize] [--memory]

Writes synthetic checkpoints of a Llama with tiny matrices and many layers, in a single file each, and runs `quantize`,
`verify` with the source, `inspect`, `report` and `merge` to bfloat16 on each, without the comparison of logits, for
which transformers loads both models. The tiny matrices make the cost of their number visible beside that of their
values. All runs are in one process, after a run that is not counted and pays for imports and compiled loops. Times are
this process's CPU time with one worker, the best of the repeats, because other work on the machine disturbs the wall
clock; they are divided by the number of tensors of the source. The last column is the time a tensor in the largest file
divided by that in the smallest.

`--memory` also runs `report` and `merge` in processes of their own, and prints their peaks. Both hold what the records
say of each tensor, and no more than one tensor's values.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import SEED, describe, table
from small_files import write_small_files
from transformers import LlamaConfig

import loftq
from loftq.display import size
from loftq.formats.checkpoint import TensorSpec, lay_out
from loftq.formats.shard_writer import ShardWriter

_HIDDEN, _INNER, _VOCABULARY = 64, 64, 320
_LARGEST = 1.3  # the ratio that the largest file may reach


def specs(layers: int) -> list[TensorSpec]:
    """The tensors of a tiny Llama with so many layers: 9 in each, and 3."""

    def spec(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name, torch.bfloat16, shape)

    tensors = [spec("model.embed_tokens.weight", _VOCABULARY, _HIDDEN), spec("model.norm.weight", _HIDDEN)]
    for i in range(layers):
        layer = f"model.layers.{i}"
        tensors += [spec(f"{layer}.self_attn.{name}_proj.weight", _HIDDEN, _HIDDEN) for name in "qkvo"]
        tensors += [spec(f"{layer}.mlp.{name}_proj.weight", _INNER, _HIDDEN) for name in ("gate", "up")]
        tensors += [spec(f"{layer}.mlp.down_proj.weight", _HIDDEN, _INNER)]
        tensors += [spec(f"{layer}.{name}_layernorm.weight", _HIDDEN) for name in ("input", "post_attention")]
    return [*tensors, spec("lm_head.weight", _VOCABULARY, _HIDDEN)]


def make_checkpoint(folder: Path, layers: int) -> Path:
    """Write a checkpoint of random values in one file, and a tokenizer that reads bytes."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(SEED)
    shards = lay_out([specs(layers)], 10**12)
    with ShardWriter(folder, shards) as writer:
        for name, (_, spec) in shards[0].offsets.items():
            writer.write(name, (torch.randn(spec.shape, generator=generator) * 0.02).to(spec.dtype))
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=_HIDDEN,
        intermediate_size=_INNER,
        vocab_size=_VOCABULARY,
        num_hidden_layers=layers,
        num_attention_heads=2,
    )
    write_small_files(folder, config)
    return folder


def verbs(source: Path, scratch: Path) -> dict[str, Callable[[], object]]:
    """What is timed, in the order in which one needs the result of the other."""
    output = scratch / "quantized"
    return {
        "quantize": lambda: loftq.quantize(
            str(source), output=str(output), rank=4, iters=1, workers=1, overwrite=True, quiet=True
        ),
        "verify": lambda: loftq.verify(output, source=str(source), quiet=True),
        "inspect": lambda: loftq.inspect(output),
        "report": lambda: loftq.report([output], html=scratch / "report.html", overwrite=True),
        "merge": lambda: loftq.merge(
            output, to="bf16", output=scratch / "merged", check=False, overwrite=True, quiet=True
        ),
    }


_PEAK = """
import pathlib, sys
import loftq, torch
from loftq.solving.report import peak_memory
scratch = pathlib.Path(sys.argv[1])
folder = scratch / "quantized"
if sys.argv[2] == "report":
    loftq.report([folder], html=scratch / "report.html", overwrite=True)
else:
    loftq.merge(folder, to="bf16", output=scratch / "merged", check=False, overwrite=True, quiet=True)
print(peak_memory(torch.device("cpu")))
"""


def peaks(scratch: Path) -> dict[str, int]:
    """Peak memory of a report and a merge, each in a process of its own."""
    found = {}
    for verb in ("report", "merge"):
        command = [sys.executable, "-c", _PEAK, str(scratch), verb]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[verb] = int(done.stdout.splitlines()[-1])
    return found


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """The least CPU time of this process for a call."""
    times = []
    for _ in range(repeats):
        gc.collect()
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def measure(
    tensors: int, repeats: int, profiled: str | None, *, memory: bool = False
) -> tuple[int, dict[str, float], dict[str, int]]:
    """The number of tensors of a checkpoint of about that many, the CPU time a tensor of each verb, and `peaks`."""
    layers = max((tensors - 3) // 9, 1)
    scratch = Path(tempfile.mkdtemp())
    try:
        source = make_checkpoint(scratch / "source", layers)
        times = {}
        for name, work in verbs(source, scratch).items():
            profile = cProfile.Profile()
            if name == profiled:
                profile.enable()
            times[name] = cpu_seconds(work, repeats) / (9 * layers + 3)
            if name == profiled:
                profile.disable()
                pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        return 9 * layers + 3, times, peaks(scratch) if memory else {}
    finally:
        shutil.rmtree(scratch)


def main() -> None:
    """Print the time a tensor, and how it grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tensors", type=int, nargs="+", default=[500, 4000, 16000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", metavar="VERB", help="print where a verb spends its time")
    parser.add_argument("--memory", action="store_true", help="print the peak memory of a report and a merge too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(describe("cpu"), end="\n\n", flush=True)
    measure(30, 1, None)  # imports, compiled loops
    figures = [measure(tensors, options.repeats, options.profile, memory=options.memory) for tensors in options.tensors]
    rows: list[tuple[str, ...]] = [
        ("CPU time a tensor", *(f"{tensors} in a file" for tensors, *_ in figures), "last / first")
    ]
    for verb, first in figures[0][1].items():
        values = [times[verb] for _, times, _ in figures]
        rows.append((verb, *(f"{1000 * value:.3f} ms" for value in values), f"{values[-1] / first:.2f}"))
    for verb, least in figures[0][2].items():
        found = [memory[verb] for *_, memory in figures]
        rows.append((f"{verb}: peak memory", *map(size, found), f"{found[-1] / least:.2f}"))
    print(table(rows))
    print(f"\nA ratio of at most {_LARGEST} is what this project promises.")


if __name__ == "__main__":
    main()
