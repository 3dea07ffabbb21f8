"""Weight error and perplexity before any training, for every type and width, plain and LoftQ.

    python benchmarks/widths.py [MODEL] [--windows 12] [--data FILE] [--types nf4 nf3 nf2 int8 int4 int3 int2]
                                [--zero-points symmetric integer float] [--ranks 16 64] [--budgets 2.5]

Quantizes MODEL (the zoo's default) by plain rounding, and by LoftQ with 1 and 5 iterations at each rank, and prints a
line for each type: bits a weight, and the relative weight error and the perplexity of each start. Scales are shared
by 64 weights, but for bitsandbytes' INT8, which has one a row. Then the same under budgets, at the first rank, for
both ways to spend them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import describe, table
from perplexity import perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import loftq
from loftq.hub.source import find_source

LENGTH = 512


def types(names: list[str], zero_points: list[str]) -> dict[str, dict[str, Any]]:
    """What to ask for, by the name of the line."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        kind, bits = name[:-1], int(name[-1])
        if kind == "nf":
            found[name.upper()] = {"bits": bits}
        for zero_point in zero_points if kind == "int" else ():
            options = {"bits": bits, "quant_type": "int", "zero_point": zero_point, "group_size": 64}
            found[f"{name.upper()}, {zero_point}"] = options
        if name == "int8":
            found["INT8, bitsandbytes"] = {"bits": 8}
    return found


def main() -> None:
    """Quantize, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--windows", type=int, default=12, help=f"windows of {LENGTH} tokens")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data" / "shakespeare.txt")
    parser.add_argument("--types", nargs="+", default=["nf4", "nf3", "nf2", "int8", "int4", "int3", "int2"])
    parser.add_argument("--zero-points", nargs="+", default=["symmetric", "integer", "float"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--budgets", type=float, nargs="*", default=[2.5])
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = find_source(options.model).folder
    tokens = AutoTokenizer.from_pretrained(source)(options.data.read_text(), return_tensors="pt").input_ids
    windows = min(options.windows, tokens.shape[1] // LENGTH)
    exact = perplexity(AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16), tokens, windows, LENGTH)
    print(f"{source.name}, {options.data.name}, {windows} windows of {LENGTH} tokens\n{describe()}")
    print(f"weight error, perplexity; at full precision 0, {exact:.2f}\n", flush=True)

    def start(rank: int, iters: int, **asked: Any) -> tuple[str, str]:
        with tempfile.TemporaryDirectory() as scratch:
            out = f"{scratch}/out"
            report = loftq.quantize(options.model, **asked, rank=rank, iters=iters, output=out, quiet=True)
            found = perplexity(loftq.load_qlora(out, is_trainable=False), tokens, windows, LENGTH)
        sums, shown = report.totals, f"{found:.2f}" if found < 1e4 else f"{found:.1e}"
        return f"{sums['bits_per_weight']:.2f}", f"{sums['error']:.4f}, {shown}"

    starts = [(rank, iters) for rank in options.ranks for iters in (1, 5)]
    rows: list[tuple[str, ...]] = [("", "bits", "plain", *(f"rank {rank}, T={iters}" for rank, iters in starts))]
    for name, asked in types(options.types, options.zero_points).items():
        bits, plain = start(options.ranks[0], 0, **asked)
        rows.append((name, bits, plain, *(start(rank, iters, **asked)[1] for rank, iters in starts)))
        print(f"{name} done", flush=True)
    print(f"\n{table(rows)}\n", flush=True)
    rows = [("budget", "bits", f"rank {options.ranks[0]}, T=5")]
    for budget in options.budgets:
        for way in ("first", "auto"):
            rows.append((f"{budget:g} bits, {way}", *start(options.ranks[0], 5, bits=budget, allocation=way)))
    print(table(rows))


if __name__ == "__main__":
    main()
