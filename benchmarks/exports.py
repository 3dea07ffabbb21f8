"""A fine-tuned model written by every target of `loftq merge`, and read by the target's own reader.

    python benchmarks/exports.py [MODEL] [--steps 20] [--windows 12] [--only NAME ...] [--calibration default]
                                 [--work DIR] [--llm-compressor PYTHON] [--llama-cpp-python PYTHON]

Two starts are trained for a few steps on the text after the windows that are evaluated: LoftQ on NF4, and QA-LoRA on
integers in groups of 64. Each export runs in a process of its own, without the check of logits, which loads both
models; its peak memory is that of this process and of those that it starts. Perplexity is measured on windows of 512
tokens of Shakespeare: by transformers in float32, with peft and compressed-tensors, by mlx-lm, and for GGUF by
llama.cpp (package cyllama). `--llm-compressor` names the Python of an environment with that package, whose GPTQ
quantizes the merged 16-bit model with the same windows of text and the same groups; `--llama-cpp-python` one with that
package, which reads the adapter of `--to gguf-lora`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from export_readers import by_llama_cpp, by_llama_cpp_with_lora, by_mlx, by_transformers
from machine import SEED, describe, table
from qalora import train
from transformers import AutoTokenizer
from transformers.utils import logging

import loftq
from loftq.display import size
from loftq.hub.source import find_source

LENGTH, GROUP, TOKENS, RANK = 512, 64, 32768, 16
_TEXT = Path(__file__).parent / "data" / "shakespeare.txt"
_STARTS: dict[str, dict[str, Any]] = {
    "qlora": {"rank": RANK},
    "qalora": {"rank": RANK // 2, "adapter": "qalora", "bits": 4, "group_size": GROUP},
}
_EXPORT = """
import json, resource, sys, time
from pathlib import Path
import loftq
folder, trained, output, settings = sys.argv[1:]
report = loftq.merge(folder, trained, output=output, quiet=True, check=False, **json.loads(settings))
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
others = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"bytes": report.bytes, "seconds": report.seconds, "peak": max(peak, others)}))
"""
_GPTQ = """
import json, resource, sys, time
from pathlib import Path
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
model, statistics, output, group = sys.argv[1:]
windows = load_file(next(Path(statistics).glob("teacher.safetensors")))["input_ids"].tolist()
weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": int(group)}
recipe = GPTQModifier(
    config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"], targets=["Linear"]
)
rows = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]})
started = time.perf_counter()
oneshot(
    model=model, dataset=rows, recipe=recipe, output_dir=output,
    max_seq_length=len(windows[0]), num_calibration_samples=len(windows),
)
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
nbytes = sum(file.stat().st_size for file in Path(output).glob("*.safetensors"))
print(json.dumps({"bytes": nbytes, "seconds": seconds, "peak": peak}))
"""


Reader = Callable[[Path, Path, torch.Tensor], float]


@dataclass(frozen=True)
class Export:
    """One row: the start that is merged, the settings of the merge, and what reads the result."""

    start: str
    settings: dict[str, Any]
    read: Reader  # of the result, the model that the start was made from, windows


def _integers(**settings: Any) -> Export:
    return Export("qlora", {"to": "compressed-tensors", "group_size": GROUP, **settings}, by_transformers)


def _gguf(kind: str) -> Export:
    return Export("qlora", {"to": "gguf", "gguf_type": kind}, by_llama_cpp)


_CALIBRATED = {"calibration_tokens": TOKENS, "sequence_length": LENGTH}
EXPORTS: dict[str, Export] = {
    "bf16": Export("qlora", {"to": "bf16"}, by_transformers),
    "compressed-tensors W4A16": _integers(),
    "compressed-tensors W4A16, calibrated": _integers(**_CALIBRATED),
    "compressed-tensors W4A16, zero-points": _integers(zero_point="integer"),
    "compressed-tensors W4A16, zero-points, calibrated": _integers(zero_point="integer", **_CALIBRATED),
    "compressed-tensors W8A16": _integers(bits=8),
    "gguf BF16": _gguf("BF16"),
    "gguf Q8_0": _gguf("Q8_0"),
    "gguf Q6_K": _gguf("Q6_K"),
    "gguf Q4_K_M": _gguf("Q4_K_M"),
    "lora, on full precision": Export("qlora", {"to": "lora"}, by_transformers),
    "mlx-lora, on full precision": Export("qlora", {"to": "mlx-lora"}, by_mlx),
    "QA-LoRA to int (our layout)": Export("qalora", {"to": "int"}, by_transformers),
    "QA-LoRA to mlx": Export("qalora", {"to": "mlx"}, by_mlx),
    "QA-LoRA to gguf-q4_1": Export("qalora", {"to": "gguf-q4_1"}, by_llama_cpp),
    "QA-LoRA to gptq, whole zero-points": Export("qalora", {"to": "gptq", "allow_rounding": True}, by_transformers),
}
BEFORE = {  # what the exports are compared with
    "full precision, before training": None,
    "NF4 and its adapter": "qlora",
    "QA-LoRA and its backbone": "qalora",
}


class Bench:
    """Two trained starts and the text, in a working folder."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.source = find_source(options.model).folder
        ids = AutoTokenizer.from_pretrained(self.source)(_TEXT.read_text(), return_tensors="pt").input_ids
        self.windows = ids[0, : options.windows * LENGTH].view(-1, LENGTH)
        self.rows: list[tuple[str, ...]] = []

    def start(self, name: str) -> tuple[Path, Path]:
        """The folder of a start and its trained adapter, made once."""
        steps, windows = self.options.steps, self.options.windows
        folder, trained = self.work / name, self.work / f"{name}-trained-{steps}-after-{windows}"
        if not trained.is_dir():
            loftq.quantize(self.options.model, output=folder, quiet=True, overwrite=folder.is_dir(), **_STARTS[name])
            train(folder, name, trained, steps, 256, self.windows.numel())
        return folder, trained

    def before(self, name: str) -> None:
        """Measure the model before training, or a start with its trained adapter, and add its row."""
        start = BEFORE[name]
        model: Any = self.source
        if start is not None:
            model = (loftq.load_qalora if start == "qalora" else loftq.load_qlora)(
                *self.start(start), dtype=torch.float32
            )
        self.rows.append((name, f"{by_transformers(model, self.source, self.windows):.2f}", "", "", ""))
        print(*self.rows[-1], flush=True)

    def export(self, name: str) -> None:
        """Write one export, read it, and add its row."""
        kind = EXPORTS[name]
        settings = dict(kind.settings)
        if "calibration_tokens" in settings:
            settings |= {"calibration": self.options.calibration, "statistics": str(self.work / "statistics")}
        self._export(name, kind.start, settings, kind.read)

    def gguf_lora(self, python: str) -> None:
        """Write the adapter for llama.cpp, let llama-cpp-python read it, and add its row."""
        self._export(
            "gguf-lora, on full precision", "qlora", {"to": "gguf-lora"}, partial(by_llama_cpp_with_lora, python)
        )

    def _export(self, name: str, start: str, settings: dict[str, Any], read: Reader) -> None:
        command = [sys.executable, "-c", _EXPORT, *self.start(start), self.work / "out", json.dumps(settings)]
        self._measured(name, command, read)

    def llm_compressor(self, python: str) -> None:
        """Let llm-compressor's GPTQ quantize the merged model, and add its row. It needs an export that calibrated."""
        folder, trained = self.start("qlora")
        merged, statistics = self.work / "merged", self.work / "statistics"
        loftq.merge(folder, trained, to="bf16", output=merged, quiet=True, check=False, overwrite=merged.is_dir())
        command = [python, "-c", _GPTQ, merged, statistics, self.work / "out", GROUP]
        self._measured("llm-compressor W4A16, GPTQ", command, by_transformers)

    def _measured(self, name: str, command: list[object], read: Reader) -> None:
        output = self.work / "out"
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=self.work)
        if done.returncode:
            self.rows.append((name, (done.stderr or done.stdout).splitlines()[-1][:100], "", "", ""))
        else:
            found = json.loads(done.stdout.splitlines()[-1])
            measured = f"{read(output, self.source, self.windows):.2f}"
            self.rows.append((name, measured, size(found["bytes"]), f"{found['seconds']:.0f} s", size(found["peak"])))
        print(*self.rows[-1], flush=True)
        shutil.rmtree(output, ignore_errors=True)


def main() -> None:
    """Train, export, read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--only", nargs="*", default=[*BEFORE, *EXPORTS], choices=[*BEFORE, *EXPORTS], metavar="NAME")
    parser.add_argument("--calibration", default="default")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--llm-compressor", metavar="PYTHON")
    parser.add_argument("--llama-cpp-python", metavar="PYTHON")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(SEED)
    print(f"{describe('cpu')}\n{options.steps} steps of 256 tokens, rank {RANK}, groups of {GROUP}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, (options.work or Path(scratch)).resolve())
        bench.work.mkdir(parents=True, exist_ok=True)
        for name in options.only:
            (bench.before if name in BEFORE else bench.export)(name)
        if options.llm_compressor is not None:
            bench.llm_compressor(str(Path(options.llm_compressor).absolute()))
        if options.llama_cpp_python is not None:
            bench.gguf_lora(str(Path(options.llama_cpp_python).absolute()))
    print(table([("", "perplexity", "size", "time", "peak memory"), *bench.rows]))


if __name__ == "__main__":
    main()
