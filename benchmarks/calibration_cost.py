"""What calibration costs: time and peak memory of whole runs, beside the data-free one.

    python benchmarks/calibration_cost.py [MODEL] [--bits 4] [--rank 16] [--data TEXT] [--tokens 65536] [--length 2048]
                                          [--layers N] [--device cuda]

Runs `loftq quantize` four times, each in a process of its own: LoftQ without text; calibrated, statistics and all;
calibrated again, with the statistics that are there; and that with the distillation. `--layers` takes random weights of
so many layers of Llama-2-7B's shapes, and bytes for tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import describe, table
from memory import config_of, make_checkpoint

from loftq.display import size


def run(*arguments: object) -> dict[str, Any]:
    """What `loftq quantize --json` reports."""
    command = [sys.executable, "-m", "loftq_cli.main", "quantize", *map(str, arguments), "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="*")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--data", default="default")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--refine", type=int, help="steps  [default: the method's]")
    parser.add_argument("--layers", type=int, help="of Llama-2-7B, instead of a model")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.layers is None:
            model = options.model[:1]
        else:
            model = [
                make_checkpoint(
                    Path(scratch) / "llama-2-7b-shapes", config_of(options.layers, mixture=False), options.device
                )
            ]
        shared = [*model, "--bits", options.bits, "--rank", options.rank, "--device", options.device]
        text = ["--calibration", options.data, "--calibration-tokens", options.tokens]
        text += ["--sequence-length", options.length, "--statistics", f"{scratch}/statistics"]
        steps = [] if options.refine is None else ["--refine", options.refine]
        runs: dict[str, list[object]] = {
            "LoftQ, without text": [],
            "calibrated": [*text, "--refine", 0],
            "calibrated, statistics kept": [*text, "--refine", 0],
            "and refined": [*text, *steps],
        }
        rows: list[tuple[str, ...]] = [("", "time", "of LoftQ's", "peak memory", "error of outputs")]
        base = 0.0
        for i, (name, more) in enumerate(runs.items()):
            found = run(*shared, *more, "--output", f"{scratch}/{i}")
            base = base or found["seconds"]
            outputs = found["totals"].get("output_error")
            shown = "" if outputs is None else f"{outputs:.4f}"
            seconds = f"{found['seconds']:.1f} s"
            rows.append((name, seconds, f"{found['seconds'] / base:.1f}x", size(found["memory_bytes"]), shown))
            print(*rows[-1], sep="  ", flush=True)
    print(f"\n{options.tokens} tokens in windows of {options.length}, {options.bits} bits, rank {options.rank}")
    print(f"{describe(options.device)}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
