"""A whole model from the start of the process to the finished folder, against the same with exact SVD.

    python benchmarks/model.py [MODEL] [--runs 3] [--parts] [--device cuda]

Runs `loftq quantize MODEL --rank 16 --iter 5` and a program that does the published procedure on the same
model with transformers, bitsandbytes and torch.linalg.svd, each in a process of its own, and prints the
median wall times, peak resident memory, and the ratio. MODEL defaults to the zoo's default. `--parts` prints the
processor time of each part of our run instead: imports one after the other, the plan, and solving with one worker.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from machine import describe, table

from loftq.hub.source import find_source

RANK, ITERATIONS = 16, 5
_PUBLISHED = f"""
import json, sys, torch
from loftq.solving.report import peak_memory
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
sys.path.insert(0, sys.argv[3])
from published import published
device = torch.device(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, device_map=device)
adapter = {{}}
for name, module in model.named_modules():
    if type(module) is torch.nn.Linear and name != "lm_head":
        backbone, b, a = published(module.weight.data.float(), {RANK}, {ITERATIONS})
        module.weight.data = backbone.bfloat16()
        adapter[f"base_model.model.{{name}}.lora_A.weight"] = a.contiguous()
        adapter[f"base_model.model.{{name}}.lora_B.weight"] = b.contiguous()
model.save_pretrained(sys.argv[2])
save_file(adapter, sys.argv[2] + "/adapter_model.safetensors")
print(json.dumps({{"memory_bytes": peak_memory(device)}}))
"""

_PARTS = f"""
import json, sys, time
parts = {{}}
last = time.process_time()

def mark(name):
    global last
    now = time.process_time()
    parts[name], last = now - last, now

import torch
mark("import torch")
import loftq.verbs.quantize as verb
mark("import loftq.verbs.quantize")
import transformers.models.llama.modeling_llama
mark("import transformers' Llama")
import peft
mark("import peft, which imports bitsandbytes")
import numba, scipy.linalg.blas, scipy.stats
mark("import numba and scipy")

def timed(name, function):
    def run(*arguments, **options):
        started = time.process_time()
        found = function(*arguments, **options)
        parts[name] = time.process_time() - started
        return found
    return run

verb.make_plan = timed("making the plan", verb.make_plan)
verb.solve_all = timed("reading, solving and writing the layers", verb.solve_all)
started = time.process_time()
options = dict(rank={RANK}, iters={ITERATIONS}, overwrite=True, quiet=True, workers=1, device=sys.argv[3])
verb.quantize(sys.argv[1], output=sys.argv[2], **options)
known = parts["making the plan"] + parts["reading, solving and writing the layers"]
parts["all else"] = time.process_time() - started - known
print(json.dumps(parts))
"""


def measure(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident megabytes of a command."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed:\n{done.stderr}")
    return time.perf_counter() - started, json.loads(done.stdout.splitlines()[-1])["memory_bytes"] / 1e6


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--parts", action="store_true", help="the processor time of the parts of our run instead")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    source = str(find_source(options.model).folder)
    here = str(Path(__file__).parent)
    print(describe(options.device), end="\n\n", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        if options.parts:
            command = [sys.executable, "-c", _PARTS, source, f"{scratch}/ours", options.device]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            parts = json.loads(done.stdout.splitlines()[-1])
            parts["together"] = sum(parts.values())
            print(table([("part", "processor"), *((name, f"{value:.2f} s") for name, value in parts.items())]))
            return
        ours = [
            sys.executable,
            *("-m", "loftq_cli.main", "quantize", source, "--output", f"{scratch}/ours", "--overwrite"),
            *("--rank", str(RANK), "--iter", str(ITERATIONS), "--json", "--quiet", "--device", options.device),
        ]
        theirs = [sys.executable, "-c", _PUBLISHED, source, f"{scratch}/theirs", here, options.device]
        fast, memory = zip(*(measure(ours) for _ in range(options.runs)), strict=True)
        slow, more = measure(theirs)
    rows = [
        (f"{Path(source).name}, rank {RANK}, {ITERATIONS} iterations", "time", "peak memory", "ratio"),
        ("published procedure, exact SVD", f"{slow:.1f} s", f"{more:.0f} MB", "1"),
        ("loftq quantize", f"{median(fast):.1f} s", f"{max(memory):.0f} MB", f"{slow / median(fast):.1f}x"),
    ]
    print(table(rows))


if __name__ == "__main__":
    main()
