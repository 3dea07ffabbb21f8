"""Loss after fine-tuning from each start: on GSM8K, or on the text of WikiText-2.

    python benchmarks/fine_tuning.py --text wikitext2_valid.txt --data gsm8k_train.jsonl [MODEL] [--steps 200]
                                     [--starts lora:64 "qlora nf4:64" "loftq nf2:64" "calibrated tcq2.25:64"]
                                     [--batch-size 4] [--cutoff-len 256] [--rates 5e-4] [--seeds 0 1 2]
                                     [--held-out 128] [--work DIR] [--device cuda]

`loftq train` from each start: METHOD TYPE:RANK of `loftq quantize`, or `lora:RANK`, an adapter on full precision.
Starts are calibrated as in calibrated.py, on the first half of TEXT; a method may have options, such as `calibrated
--calibration DIR/task.txt`, where the examples to train on are written as a text. With `--data` the task is GSM8K,
whose last examples are held out; without, it is to continue the first half of TEXT, and its second half is held out.
Prints the mean loss a token on what is held out, before and after, with its spread over seeds, which decide the order
of examples. If several rates are given, the one counts that serves a start best on the first seed. What is done is
kept in DIR, where a later call, or calibrated.py, finds it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from calibrated import Bench as Starts
from calibrated import spread
from machine import describe, table
from transformers.utils import logging

import loftq
from loftq.training.tasks.gsm8k import PROMPT

STARTS = ("lora:64", "qlora nf4:64", "loftq nf2:64", "calibrated nf2:64", "calibrated tcq2:64", "calibrated tcq2.25:64")
LARGEST = 128  # number of examples that are held out


class Bench:
    """Trains what is not in its log yet."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work, self.log = options, work, work / "fine-tuning.jsonl"
        self.starts = Starts(options.model, options.text, work, options.device)
        if options.data is not None:
            rows = options.data.read_text(encoding="utf-8").splitlines(keepends=True)
            self.task, self.data, self.held_out = "gsm8k", work / "train.jsonl", work / "held.jsonl"
            self.data.write_text("".join(rows[:-LARGEST]), encoding="utf-8")
            self.held_out.write_text("".join(rows[-LARGEST:][: options.held_out]), encoding="utf-8")
            examples = [f"{PROMPT.format(row['question'])} {row['answer']}" for row in map(json.loads, rows[:-LARGEST])]
            (work / "task.txt").write_text("\n\n".join(examples), encoding="utf-8")
        else:
            text = options.text.read_text(encoding="utf-8")
            self.task, self.data, self.held_out = "clm", work / "calibration.txt", work / "held.txt"
            self.held_out.write_text(text[len(text) // 2 :], encoding="utf-8")
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.is_file() else []
        self.done = {tuple(row["key"]): row for row in map(json.loads, lines)}

    def _model(self, start: str) -> dict[str, Any]:
        """A start as arguments of `loftq.train`."""
        run, _, rank = start.partition(":")
        if run == "lora":
            return {"model": self.starts.source, "adapter": "lora", "rank": int(rank), "alpha": int(rank)}
        method, _, kind = run.rpartition(" ")
        return {"model": self.starts.folder(method, kind, int(rank), 0)}

    def losses(self, start: str, rate: float, seed: int) -> dict[str, float]:
        """On what is held out, before and after."""
        options = self.options
        first = seed == options.seeds[0]  # with which a start is measured, once for all seeds
        key = (self.task, start, options.steps, options.batch_size, options.cutoff_len, rate, seed, options.held_out)
        if key not in self.done:
            with tempfile.TemporaryDirectory(dir=self.work) as folder:
                output = Path(folder) / "out"
                result = loftq.train(
                    **self._model(start),
                    task=self.task,
                    data=self.data,
                    eval_data=self.held_out,
                    output=output,
                    max_steps=options.steps,
                    batch_size=options.batch_size,
                    learning_rate=rate,
                    cutoff_len=options.cutoff_len,
                    eval_steps=options.steps,
                    seed=seed,
                    quiet=True,
                    set={"eval_on_start": first, "save_strategy": "no", "logging_steps": max(options.steps // 5, 1)},
                )
                history = json.loads((output / "training.json").read_text(encoding="utf-8"))["history"]
            found = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
            before = found[0] if first else self.losses(start, rate, options.seeds[0])["before"]
            curve = [entry["loss"] for entry in history if "loss" in entry]
            row = {"before": before, "after": found[-1], "curve": curve, "seconds": result.seconds}
            self.done[key] = {"key": key, **row}
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.done[key]) + "\n")
            print(*key, f"{before:.4f} -> {found[-1]:.4f}", flush=True)
        return self.done[key]


def main() -> None:
    """Quantize, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", type=Path, required=True, help="to calibrate on: WikiText-2's validation split")
    parser.add_argument("--data", type=Path, help="GSM8K's training split")
    parser.add_argument("--starts", nargs="+", default=STARTS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--cutoff-len", type=int, default=256)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held-out", type=int, default=LARGEST, help=f"examples of GSM8K, at most {LARGEST}")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    logging.set_verbosity_error()
    lines: list[tuple[str, ...]] = [("start", "rate", "before", "after", "training loss, five parts of the steps")]
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, options.work or Path(scratch))
        for start in options.starts:
            first = [bench.losses(start, rate, options.seeds[0])["after"] for rate in options.rates]
            rate = options.rates[first.index(min(first))]
            found = [bench.losses(start, rate, seed) for seed in options.seeds]
            after = spread([row["after"] for row in found], 4)
            curve = ", ".join(f"{loss:.2f}" for loss in found[0]["curve"][:5])
            lines.append((start, f"{rate:g}", f"{found[0]['before']:.4f}", after, curve))
    what = f"{options.steps} steps of {options.batch_size} examples of at most {options.cutoff_len} tokens"
    print(f"\n{bench.task}, {what}, seeds {options.seeds}; {describe()}\n")
    print(table(lines))


if __name__ == "__main__":
    main()
