"""What a model of each width takes: on disk, loaded, and at the peak of a training step.

    python benchmarks/footprint.py [MODEL] [--tokens 512] [--rank 16]

Quantizes MODEL (the zoo's default) to 4, 3 and 2 bits, and loads each, and the 16-bit model with a LoRA adapter,
in a process of its own: bytes of the linears on disk and in memory, bits a weight, and resident memory, of the GPU
where there is one, with the model loaded and at the peak of a training step of one sequence.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from machine import SEED, describe, table

import loftq
from loftq.display import size
from loftq.hub.source import find_source

_CHILD = """
import json, resource, sys
import torch
from pathlib import Path
import loftq
from loftq.models.linears import find_linears

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line[:5]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}

folder, tokens, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if (Path(folder) / "loftq.json").is_file():
    model = loftq.load_qlora(folder)
    base = model.base_model.model
else:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    place = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=place)
    model = get_peft_model(base, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
held = 0
for name, module in base.named_modules():
    if hasattr(module, "lora_A"):
        tensors = list(module.base_layer.state_dict().values())
        held += sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
before = resident()["VmRSS"]
gpu = model.device.type != "cpu"
if gpu:
    before = torch.cuda.memory_allocated()
inputs = torch.randint(100, (1, tokens)).to(model.device)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
model.train()
model.gradient_checkpointing_enable()
model(input_ids=inputs, labels=inputs).loss.backward()
optimizer.step()
peak = torch.cuda.max_memory_allocated() if gpu else resident()["VmHWM"]
print(json.dumps({"held": held, "loaded": before, "peak": peak}))
"""


def measure(folder: Path, tokens: int, rank: int) -> dict[str, int]:
    """Load and train one step in a process of its own."""
    command = [sys.executable, "-c", _CHILD, str(folder), str(tokens), str(rank)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Quantize, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    torch.manual_seed(SEED)
    source = find_source(options.model)
    print(describe(), end="\n\n", flush=True)
    found = measure(source.folder, options.tokens, options.rank)
    heads = ("linears on disk", "bits a weight", "linears in memory", "bits a weight", "process loaded", "step's peak")
    rows: list[tuple[str, ...]] = [("", *heads)]
    for bits in (16, 4, 3, 2):
        with tempfile.TemporaryDirectory() as scratch:
            if bits == 16:
                plan = loftq.quantize(options.model, rank=options.rank, dry_run=True)
                weights, on_disk = plan.totals["weights"], 2 * plan.totals["weights"]
            else:
                report = loftq.quantize(
                    options.model, bits=bits, rank=options.rank, iters=1, output=f"{scratch}/out", quiet=True
                )
                on_disk = report.totals["bits_per_weight"] * weights / 8
                found = measure(Path(scratch) / "out", options.tokens, options.rank)
        rows.append(
            (
                "bfloat16" if bits == 16 else f"NF{bits}",
                size(on_disk),
                f"{8 * on_disk / weights:.2f}",
                size(found["held"]),
                f"{8 * found['held'] / weights:.2f}",
                size(found["loaded"]),
                size(found["peak"]),
            )
        )
    print(table(rows))


if __name__ == "__main__":
    main()
