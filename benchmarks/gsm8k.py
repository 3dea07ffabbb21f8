"""Loss after fine-tuning on GSM8K, from each start, at 4 and at 2 bits.

    python benchmarks/gsm8k.py --data gsm8k_train.jsonl --calibration TEXT [MODEL] [--starts 4:16 2:64] [--steps 200]
                               [--batch-size 4] [--rates 2e-4 5e-4 1e-3] [--seeds 0 1 2] [--work DIR]
                               [--device cuda]

`loftq train --task gsm8k` from QLoRA's, LoftQ's and a calibrated start (bits:rank), calibrated on 65,536 tokens of TEXT
in windows of 512. Prints the mean loss a token on 128 held-out answers before and after, with its spread over seeds,
which decide the order of examples. The rate is that of those tried that serves each start best on the first seed.
Starts are made on `--device`; training takes the GPU where there is one. What is done is kept in DIR, where a later
call finds it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from calibrated import spread
from machine import describe, table
from transformers.utils import logging

import loftq

HELD_OUT = 128
METHODS = ("qlora", "loftq", "calibrated")


class Bench:
    """Trains what is not in its log yet."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work, self.log = options, work, work / "gsm8k.jsonl"
        work.mkdir(parents=True, exist_ok=True)
        rows = options.data.read_text(encoding="utf-8").splitlines(keepends=True)
        held = min(options.held_out, HELD_OUT)
        (work / "train.jsonl").write_text("".join(rows[:-HELD_OUT]), encoding="utf-8")
        (work / "held.jsonl").write_text("".join(rows[-HELD_OUT:][:held]), encoding="utf-8")
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.is_file() else []
        self.done = {tuple(row["key"]): row for row in map(json.loads, lines)}

    def start(self, bits: int, rank: int, method: str) -> Path:
        """The artifact of a start."""
        folder = self.work / f"{method}-{bits}-{rank}"
        if not (folder / "loftq.json").is_file():
            text: dict[str, Any] = {"calibration": self.options.calibration, "sequence_length": 512}
            known = dict(text) if method == "calibrated" else {}
            known |= {"device": self.options.device, "quiet": True}
            loftq.quantize(self.options.model, bits=bits, rank=rank, method=method, output=folder, **known)
        return folder

    def losses(self, bits: int, rank: int, method: str, rate: float, seed: int) -> dict[str, float]:
        """On held-out answers, before and after."""
        options = self.options
        first = seed == options.seeds[0]  # with which a start is measured, once for all seeds
        key = (bits, rank, method, options.steps, options.batch_size, rate, seed, options.held_out)
        if key not in self.done:
            with tempfile.TemporaryDirectory(dir=self.work) as folder:
                output = Path(folder) / "out"
                loftq.train(
                    self.start(bits, rank, method),
                    task="gsm8k",
                    data=self.work / "train.jsonl",
                    eval_data=self.work / "held.jsonl",
                    output=output,
                    max_steps=options.steps,
                    batch_size=options.batch_size,
                    learning_rate=rate,
                    cutoff_len=256,
                    eval_steps=options.steps,
                    seed=seed,
                    quiet=True,
                    set={"eval_on_start": first, "save_strategy": "no"},
                )
                history = json.loads((output / "training.json").read_text(encoding="utf-8"))["history"]
            found = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
            before = found[0] if first else self.losses(bits, rank, method, rate, options.seeds[0])["before"]
            self.done[key] = {"key": key, "before": before, "after": found[-1]}
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.done[key]) + "\n")
            print(*key, f"{before:.4f} -> {found[-1]:.4f}", flush=True)
        return self.done[key]


def main() -> None:
    """Quantize, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--calibration", default="default", help="text for the calibrated start")
    parser.add_argument("--starts", nargs="+", default=["4:16", "2:64"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4, 5e-4, 1e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help=f"examples, at most {HELD_OUT}")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    logging.set_verbosity_error()
    lines: list[tuple[str, ...]] = [("start", "method", "rate", "before", "after")]
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, options.work or Path(scratch))
        for start in options.starts:
            bits, rank = map(int, start.split(":"))
            for method in METHODS:
                first = [bench.losses(bits, rank, method, rate, options.seeds[0])["after"] for rate in options.rates]
                rate = options.rates[first.index(min(first))]
                found = [bench.losses(bits, rank, method, rate, seed) for seed in options.seeds]
                after = spread([row["after"] for row in found], 4)
                lines.append((f"{bits} bits, rank {rank}", method, f"{rate:g}", f"{found[0]['before']:.4f}", after))
    print(f"\n{options.steps} steps of {options.batch_size} examples, seeds {options.seeds}; {describe()}\n")
    print(table(lines))


if __name__ == "__main__":
    main()
