"""Weight error and perplexity before any training, for every width, plain and LoftQ.

    python benchmarks/widths.py [MODEL] [--windows 12] [--data FILE] [--bits 4 3 2] [--ranks 16 64] [--budgets 2.5]

Quantizes MODEL (the zoo's default) by plain rounding, and by LoftQ with 1 and 5 iterations at each rank, and prints
bits a weight, the relative weight error and the perplexity of the start; then the same under budgets, at the first
rank, for both ways to spend them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from machine import describe, table
from perplexity import perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import loftq
from loftq.pipeline.source import find_source

LENGTH = 512


def main() -> None:
    """Quantize, evaluate, print a row each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--windows", type=int, default=12, help=f"windows of {LENGTH} tokens")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data" / "shakespeare.txt")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--budgets", type=float, nargs="*", default=[2.5])
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = find_source(options.model).folder
    tokens = AutoTokenizer.from_pretrained(source)(options.data.read_text(), return_tensors="pt").input_ids
    windows = min(options.windows, tokens.shape[1] // LENGTH)
    full = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    exact = perplexity(full, tokens, windows, LENGTH)
    print(f"{source.name}, {options.data.name}, {windows} windows of {LENGTH} tokens\n{describe()}\n", flush=True)
    rows: list[tuple[str, ...]] = [("", "bits", "rank", "iterations", "weight error", "perplexity")]
    rows.append(("full precision", "16", "", "", "0", f"{exact:.2f}"))
    starts: list[tuple[float, str | None, int, int]] = []
    for bits in options.bits:
        starts.append((bits, None, options.ranks[0], 0))
        starts += [(bits, None, rank, iters) for rank in options.ranks for iters in (1, 5)]
    starts += [(budget, way, options.ranks[0], 5) for budget in options.budgets for way in ("first", "auto")]
    for bits, allocation, rank, iters in starts:
        with tempfile.TemporaryDirectory() as scratch:
            report = loftq.quantize(
                options.model,
                bits=bits,
                allocation=allocation,
                rank=rank,
                iters=iters,
                output=f"{scratch}/out",
                quiet=True,
            )
            found = perplexity(loftq.load_qlora(report.folder, is_trainable=False), tokens, windows, LENGTH)
        sums = report.totals
        shown = (f"{sums['error']:.4f}", f"{found:.2f}" if found < 1e4 else f"{found:.1e}")
        name = f"NF{bits}, {'LoftQ' if iters else 'plain'}" if allocation is None else f"{bits:g} bits, {allocation}"
        rows.append((name, f"{sums['bits_per_weight']:.2f}", str(rank) if iters else "", str(iters), *shown))
    print(table(rows))


if __name__ == "__main__":
    main()
