"""What calibration costs: time and peak memory of whole runs, beside the data-free one and a plain pass of the model.

    python benchmarks/calibration_cost.py [MODEL] [--bits 4] [--rank 16] [--data TEXT] [--tokens 65536] [--length 2048]
                                          [--layers N] [--raw] [--device cuda]

Runs `loftq quantize` four times, each in a process of its own: LoftQ without text; calibrated, statistics and all;
calibrated again, with the statistics that are there; and that with the distillation, unless `--refine 0`. `--layers`
takes random weights of so many layers of Llama-2-7B's shapes, and bytes for tokens.

The difference between the second run and the third, in processor time of all threads, is what gathering the statistics
costs. It is printed as a multiple of the model's forward pass over as many tokens by transformers, logits included: in
torch's own setting, and with the products that loftq uses (`core.kernels.products`). `--raw` makes these passes only.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import describe, table
from memory import config_of, make_checkpoint

from loftq.display import size
from loftq.hub.source import find_source

_PASS = """
import sys, time, torch
from contextlib import nullcontext
from loftq.core.kernels.products import fast_products
from transformers import AutoModelForCausalLM
folder, device = sys.argv[1], torch.device(sys.argv[2])
tokens, length = int(sys.argv[3]), int(sys.argv[4])
dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
windows = torch.randint(min(256, model.config.vocab_size), (tokens // length, length), device=device)
with torch.no_grad():
    for setting in (nullcontext, fast_products):
        with setting():
            model(windows[:1, :64], use_cache=False)
            started = time.process_time()
            for batch in windows.split(max(1, 2048 // length)):
                model(batch, use_cache=False)
            print(time.process_time() - started)
"""


def run(*arguments: object) -> dict[str, Any]:
    """What `loftq quantize --json` reports, and its `processor` seconds."""
    before = _processor_seconds()
    command = [sys.executable, "-m", "loftq_cli.main", "quantize", *map(str, arguments), "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"processor": _processor_seconds() - before}


def _processor_seconds() -> float:
    """The processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def forward_passes(model: Path, device: str, tokens: int, length: int) -> tuple[float, float]:
    """Processor seconds of a forward pass by transformers: in torch's own setting, and with our products."""
    command = [sys.executable, "-c", _PASS, str(model), device, str(tokens), str(length)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    own, fast = map(float, done.stdout.split())
    return own, fast


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
    parser.add_argument("--raw", action="store_true", help="only the forward passes of transformers")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.layers is None:
            model = options.model[:1]
        else:
            config = config_of(options.layers, mixture=False)
            model = [make_checkpoint(Path(scratch) / "llama-2-7b-shapes", config, options.device)]
        print(describe(options.device), end="\n\n", flush=True)
        folder = Path(model[0]) if model else find_source(None).folder
        own, fast = forward_passes(folder, options.device, options.tokens, options.length)
        print(f"forward pass of {options.tokens} tokens: {own:.1f} s of the processor, {fast:.1f} with our products")
        if options.raw:
            return
        shared = [*model, "--bits", options.bits, "--rank", options.rank, "--device", options.device]
        text = ["--calibration", options.data, "--calibration-tokens", options.tokens]
        text += ["--sequence-length", options.length, "--statistics", f"{scratch}/statistics"]
        steps = [] if options.refine is None else ["--refine", options.refine]
        runs: dict[str, list[object]] = {
            "LoftQ, without text": [],
            "calibrated": [*text, "--refine", 0],
            "calibrated, statistics kept": [*text, "--refine", 0],
        }
        if options.refine != 0:
            runs["and refined"] = [*text, *steps]
        rows: list[tuple[str, ...]] = [("", "time", "of LoftQ's", "processor", "peak memory", "error of outputs")]
        base, processor = 0.0, []
        for i, (name, more) in enumerate(runs.items()):
            found = run(*shared, *more, "--output", f"{scratch}/{i}")
            base = base or found["seconds"]
            processor.append(found["processor"])
            outputs = found["totals"].get("output_error")
            shown = "" if outputs is None else f"{outputs:.4f}"
            times = f"{found['seconds']:.1f} s", f"{found['seconds'] / base:.1f}x", f"{processor[-1]:.1f} s"
            rows.append((name, *times, size(found["memory_bytes"]), shown))
            print(*rows[-1], sep="  ", flush=True)
        gathering = processor[1] - processor[2]
    print(f"\n{options.tokens} tokens in windows of {options.length}, {options.bits} bits, rank {options.rank}")
    print(f"gathering {gathering:.1f} s of the processor: {gathering / own:.2f}x a forward pass, ", end="")
    print(f"{gathering / fast:.2f}x one with our products; solving with all else {processor[2]:.1f} s\n\n{table(rows)}")


if __name__ == "__main__":
    main()
