"""QA-LoRA trained and merged, beside NF4 QLoRA: loss, step time, memory, and what a merge keeps.

    python benchmarks/qalora.py [MODEL] [--bits 4 3 2] [--group-size 64] [--rank 16] [--steps 40] [--tokens 256]

Trains each adapter on windows of a text, in a process of its own, and prints its first and last losses (means of 5
steps), the median time of a step, the bytes that the linears hold and the peak of the process. Then perplexity on
windows that were not trained on, in float32: of the adapter on its backbone, of the exact merge, and of the merge
into whole zero-points, which moves the weights so many times as far as the adapter does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import SEED, describe, table
from perplexity import perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import loftq
from loftq.display import size
from loftq.hub.source import find_source

LENGTH = 512
_TEXT = Path(__file__).parent / "data" / "shakespeare.txt"
_CHILD = """
import json, resource, sys, time
from pathlib import Path
from statistics import median
import torch
import loftq
from transformers import AutoTokenizer

folder, kind, text, trained, steps, tokens, skipped, seed = sys.argv[1:]
steps, tokens = int(steps), int(tokens)
torch.manual_seed(int(seed))
model = (loftq.load_qalora if kind == "qalora" else loftq.load_qlora)(folder)
held = 0
for module in model.modules():
    if hasattr(module, "lora_A"):
        stored = module.base_layer.state_dict().values()
        held += sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in stored}.values())
ids = AutoTokenizer.from_pretrained(folder)(Path(text).read_text(), return_tensors="pt").input_ids[:, int(skipped):]
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
model.train()
losses, times = [], []
for step in range(steps):
    started = time.perf_counter()
    first = step % (ids.shape[1] // tokens) * tokens  # around again where the text ends
    window = ids[:, first : first + tokens].to(model.device)
    loss = model(input_ids=window, labels=window).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    times.append(time.perf_counter() - started)
model.save_pretrained(trained)
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print(json.dumps({"losses": losses, "step": median(times), "held": held, "peak": peak}))
"""


def train(folder: Path, kind: str, trained: Path, steps: int, tokens: int, skipped: int) -> dict[str, Any]:
    """Train in a process of its own; what it measured."""
    arguments = [folder, kind, _TEXT, trained, steps, tokens, skipped, SEED]
    done = subprocess.run([sys.executable, "-c", _CHILD, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Quantize, train, merge, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--windows", type=int, default=12, help=f"windows of {LENGTH} tokens to evaluate on")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = find_source(options.model).folder
    ids = AutoTokenizer.from_pretrained(source)(_TEXT.read_text(), return_tensors="pt").input_ids
    skipped = options.windows * LENGTH
    print(f"{source.name}, {options.steps} steps of {options.tokens} tokens, rank {options.rank}")
    print(describe(), end="\n\n", flush=True)

    def measure(model: Any) -> str:
        return f"{perplexity(model, ids, options.windows, LENGTH):.4f}"

    trainings: list[tuple[str, ...]] = [("", "first loss", "last loss", "step", "linears hold", "peak")]
    merges: list[tuple[str, ...]] = [
        ("perplexity", "at init", "trained", "exact merge", "logits differ", "whole zero-points", "moved by rounding")
    ]
    for bits in (0, *options.bits):
        with tempfile.TemporaryDirectory() as scratch:
            folder, trained = Path(scratch) / "folder", Path(scratch) / "trained"
            kind = "qalora" if bits else "qlora"
            asked = {"bits": bits, "adapter": "qalora", "group_size": options.group_size} if bits else {}
            loftq.quantize(options.model, output=folder, rank=options.rank, quiet=True, **asked)
            found = train(folder, kind, trained, options.steps, options.tokens, skipped)
            first, last = (sum(losses) / 5 for losses in (found["losses"][:5], found["losses"][-5:]))
            name = f"QA-LoRA, INT{bits}" if bits else "QLoRA, NF4"
            step, held, peak = f"{found['step']:.2f} s", size(found["held"]), size(found["peak"])
            trainings.append((name, f"{first:.3f}", f"{last:.3f}", step, held, peak))
            print(f"{name} trained", flush=True)
            if not bits:
                continue
            start = measure(loftq.load_qalora(folder, dtype=torch.float32, is_trainable=False))
            adapted = measure(loftq.load_qalora(folder, trained, dtype=torch.float32, is_trainable=False))
            exact = loftq.merge(folder, trained, to="int", output=Path(scratch) / "int", quiet=True)
            whole = loftq.merge(
                folder, trained, to="gptq", output=Path(scratch) / "gptq", allow_rounding=True, check=False, quiet=True
            )
            merged, rounded = (
                measure(AutoModelForCausalLM.from_pretrained(report.folder, dtype=torch.float32))
                for report in (exact, whole)
            )
            merges.append((name, start, adapted, merged, f"{exact.difference:.1e}", rounded, f"{whole.lost:.2g}x"))
    print(f"\n{table(trainings)}\n\n{table(merges)}")


if __name__ == "__main__":
    main()
