"""Perplexity before any training: how much of what quantization costs each start leaves.

    python benchmarks/calibrated.py --data FILE [MODEL] [--starts nf4:16 nf4:64 nf3:64 nf2:64] [--seeds 0 1 2]
                                    [--runs qlora loftq qera calibrated "calibrated --refine 0"] [--work DIR]
                                    [--device cuda]

The first half of FILE is calibrated on, its second half evaluated: 24 windows of 512 tokens, in float32. A start is a
type and a rank, a run a method with options of `loftq quantize`; a seed draws another sample of 65,536 tokens to
calibrate on. Prints the mean perplexity and its spread over the seeds, as a multiple of full precision's, and as a part
of the gap that QLoRA's start leaves; and KL(full precision ‖ start), in nats a token, which unlike perplexity no luck
can lower. What is done is kept in DIR, where a later call finds it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from machine import describe, table
from perplexity import against, answers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import loftq
from loftq.core.solvers.methods import METHODS
from loftq.hub.source import find_source
from loftq_cli.quantize import quantize as command

LENGTH, WINDOWS, TOKENS = 512, 24, 65536
PLAIN = "qlora"


def asked(run: str) -> dict[str, Any]:
    """A method and options as `loftq quantize` reads them, as keyword arguments."""
    method, *options = shlex.split(run)
    with command.make_context("quantize", ["--method", method, *options]) as context:
        return {
            name: value
            for name, value in context.params.items()
            if context.get_parameter_source(name).name == "COMMANDLINE"
        }


class Bench:
    """Measures what is not in its log yet."""

    def __init__(self, model: str | None, data: Path, work: Path, device: str = "cpu") -> None:
        self.model, self.work, self.log, self.device = model, work, work / "log.jsonl", device
        work.mkdir(parents=True, exist_ok=True)
        self.source = find_source(model).folder
        text = data.read_text(encoding="utf-8")
        half = len(text) // 2
        (work / "calibration.txt").write_text(text[:half], encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(self.source)
        self.tokens = tokenizer(text[half:], return_tensors="pt").input_ids
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.is_file() else []
        self.done = {tuple(row["key"]): row for row in map(json.loads, lines)}

    @cached_property
    def answers(self) -> list[torch.Tensor]:
        """What full precision answers."""
        return answers(self._full(), self.tokens, WINDOWS, LENGTH)

    def _full(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32, device_map=self.device)

    def exact(self) -> float:
        """The perplexity of full precision."""
        return float(self._once(("full precision",), lambda: self.measure(self._full()))["perplexity"])

    def start(self, run: str, kind: str, rank: int, seed: int) -> dict[str, Any]:
        """What a start is like."""

        def measure() -> dict[str, Any]:
            report = self._quantize(run, kind, rank, seed)
            placed = {"device_map": self.device, "dtype": torch.float32}
            found = self.measure(loftq.load_qlora(report.folder, is_trainable=False, **placed))
            return {**report.totals, **found, "seconds": report.seconds}

        return self._once((run, kind, rank, seed), measure)

    def folder(self, run: str, kind: str, rank: int, seed: int) -> Path:
        """The artifact of a start, which is made unless it is there."""
        folder = self._path(run, kind, rank, seed)
        if not (folder / "loftq.json").is_file():
            self._quantize(run, kind, rank, seed)
        return folder

    def _path(self, run: str, kind: str, rank: int, seed: int) -> Path:
        return self.work / "-".join(["start", *run.replace("/", "_").split(), kind, str(rank), str(seed)])

    def _quantize(self, run: str, kind: str, rank: int, seed: int) -> Any:
        quant_type = kind.rstrip("0123456789.")
        bits = float(kind.removeprefix(quant_type))
        options = {"bits": bits, "quant_type": quant_type, "rank": rank, "seed": seed, **asked(run)}
        if METHODS[options["method"]].calibrated:
            options.setdefault("calibration", self.work / "calibration.txt")
            options = {"calibration_tokens": TOKENS, "sequence_length": LENGTH, **options}
            name = f"{Path(options['calibration']).name}-{options['calibration_tokens']}-{options['sequence_length']}"
            options["statistics"] = self.work / f"statistics-{name}-{seed}"
        output = self._path(run, kind, rank, seed)
        return loftq.quantize(self.model, output=output, overwrite=True, device=self.device, quiet=True, **options)

    def measure(self, model: Any) -> dict[str, Any]:
        """Perplexity on the second half, and divergence from full precision."""
        found, divergence = against(model, self.answers, self.tokens, WINDOWS, LENGTH)
        return {"perplexity": found, "kl": divergence}

    def _once(self, key: tuple[Any, ...], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self.done:
            self.done[key] = {"key": key, **measure()}
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.done[key]) + "\n")
            print(*key, f"{self.done[key]['perplexity']:.3f}, {self.done[key]['kl']:.4f}", flush=True)
        return self.done[key]


def spread(values: list[float], digits: int) -> str:
    """The mean, and how far the values lie from it at most."""
    middle = mean(values)
    return f"{middle:.{digits}f} ± {max(abs(value - middle) for value in values):.{digits}f}"


def main() -> None:
    """Quantize, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--data", type=Path, required=True, help="text, as WikiText-2's validation split")
    parser.add_argument("--starts", nargs="+", default=["nf4:16", "nf4:64", "nf3:64", "nf2:64"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", default=["loftq", "qera", "calibrated --refine 0", "calibrated"])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options.model, options.data, options.work or Path(scratch), options.device)
        exact = bench.exact()
        rows: list[tuple[str, ...]] = [("start", "method", "perplexity", "of full precision", "of QLoRA's gap", "KL")]
        for asked_for in options.starts:
            kind, _, rank = asked_for.partition(":")
            start = bench.start(PLAIN, kind, 16, 0)  # of any rank: B = 0
            plain = float(start["perplexity"])
            shown = f"{plain:.2f}" if plain < 1e4 else f"{plain:.1e}"
            name = f"{kind.upper()}, rank {rank}"
            rows.append((name, PLAIN, shown, f"{plain / exact:.3g}", "100 %", f"{start['kl']:.4f}"))
            for run in options.runs:
                calibrated = METHODS[shlex.split(run)[0]].calibrated
                seeds = options.seeds if calibrated else options.seeds[:1]
                starts = [bench.start(run, kind, int(rank), seed) for seed in seeds]
                found = [float(start["perplexity"]) for start in starts]
                multiples = spread([value / exact for value in found], 3)
                gaps = spread([100 * (value - exact) / (plain - exact) for value in found], 1)
                distances = spread([float(start["kl"]) for start in starts], 4)
                rows.append(("", run, spread(found, 2), multiples, f"{gaps} %", distances))
        print(f"\n{bench.source.name}, {options.data.name}, {WINDOWS} windows of {LENGTH} tokens")
        print(describe(options.device))
        print(f"full precision {exact:.3f}; seeds {options.seeds}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
