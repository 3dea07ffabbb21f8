"""The time that `loftq train --dry-run` expects, beside the time that the same training takes.

    python benchmarks/pace.py [MODEL] [--steps 4] [--batch-size 2] [--length 256]

NF4, rank 16, blocks of Shakespeare, the default dtype of the device; with and without gradient checkpointing. The
training's own time is transformers' `train_runtime`, without loading and evaluation. Prints both, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from machine import describe, table

import loftq
from loftq.training.estimate import estimate

TEXT = Path(__file__).parent / "data" / "shakespeare.txt"


def main() -> None:
    """Quantize, then plan and train each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="by default the default model of loftq")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    print(describe())
    rows = [("", "expected", "took", "took / expected")]
    with tempfile.TemporaryDirectory() as folder:
        made = loftq.quantize(options.model, output=Path(folder) / "made", rank=16, iters=1, quiet=True).folder
        for kept in (False, True):
            output = Path(folder) / f"out-{kept}"
            settings: dict[str, Any] = {"data": str(TEXT), "task": "clm", "output": str(output)}
            settings |= {"cutoff_len": options.length, "batch_size": options.batch_size, "max_steps": options.steps}
            settings |= {"gradient_checkpointing": kept, "save_steps": 1000, "eval_steps": 1000}
            expected = estimate(str(made), **settings).seconds
            loftq.train(str(made), quiet=True, **settings)
            history = json.loads((output / "training.json").read_text())["history"]
            took = next(entry["train_runtime"] for entry in history if "train_runtime" in entry)
            name = "gradient checkpointing" if kept else "plain"
            rows.append((name, f"{expected:.1f} s", f"{took:.1f} s", f"{took / expected:.2f}"))
    print(table(rows))


if __name__ == "__main__":
    main()
