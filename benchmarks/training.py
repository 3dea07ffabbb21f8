"""`loftq train` beside the same run written with stock transformers, peft and bitsandbytes: time and memory.

    python benchmarks/training.py [MODEL] [--steps 10] [--batch-size 2] [--length 256] [--repeats 5]

NF4, rank 16, blocks of Shakespeare, bfloat16, the same optimizer, schedule and batches; each run in a process of its
own, by turns. Prints seconds a step (the median, without the first two) and the peak memory of the process, or of the
GPU where there is one, on which the optimizer is the paged 8-bit AdamW; and what `loftq train --dry-run` had estimated
beside the program.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import describe, settle, table

TEXT = Path(__file__).parent / "data" / "shakespeare.txt"
RATE = 2e-4


def timer() -> Any:
    """A callback that notes when steps end."""
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        ends: list[float]

        def on_step_end(self, *_: Any, **__: Any) -> None:
            settle()
            self.ends.append(time.perf_counter())

    found = Timer()
    found.ends = []
    return found


def ours(folder: str, options: argparse.Namespace) -> list[float]:
    """By loftq."""
    import loftq
    from loftq.training import train

    clock, made = timer(), train._trainer

    def timed(*arguments: Any, **named: Any) -> Any:
        trainer = made(*arguments, **named)
        trainer.add_callback(clock)
        return trainer

    train._trainer = timed
    with tempfile.TemporaryDirectory() as scratch:
        loftq.train(
            folder,
            task="clm",
            data=TEXT,
            output=f"{scratch}/out",
            cutoff_len=options.length,
            max_steps=options.steps,
            batch_size=options.batch_size,
            eval_batch_size=options.batch_size,
            learning_rate=RATE,
            eval_steps=10**6,
            quiet=True,
            set={"save_strategy": "no", "logging_strategy": "no"},
        )
    return list(clock.ends)


def stock(folder: str, options: argparse.Namespace) -> list[float]:
    """As the documentation of transformers and peft has it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

    gpu = torch.cuda.is_available()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    base.enable_input_require_grads()
    model = PeftModel.from_pretrained(base, folder, subfolder="loftq_init", is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    blocks = ids[: len(ids) // options.length * options.length].view(-1, options.length)
    rows = [{"input_ids": block, "attention_mask": torch.ones_like(block), "labels": block} for block in blocks]
    clock = timer()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            optim="paged_adamw_8bit" if gpu else "adamw_torch",
            bf16=gpu,
            use_cpu=not gpu,
            dataloader_pin_memory=gpu,
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        callbacks = [clock]
        Trainer(model, arguments, default_data_collator, rows, callbacks=callbacks).train()
    return list(clock.ends)


def main() -> None:
    """Run both by turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--run", choices=["ours", "stock"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        ends = {"ours": ours, "stock": stock}[options.run](options.model, options)
        steps = [after - before for before, after in itertools.pairwise(ends)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        print(json.dumps({"seconds": median(steps), "peak": peak}))
        return
    import loftq
    from loftq.training.estimate import estimate

    with tempfile.TemporaryDirectory() as scratch:
        folder = loftq.quantize(options.model, rank=16, output=f"{scratch}/made", quiet=True).folder
        sizes = {"cutoff_len": options.length, "batch_size": options.batch_size}
        planned = estimate(str(folder), task="clm", data=TEXT, output="none", **sizes)
        found: dict[str, list[dict[str, float]]] = {"stock": [], "ours": []}
        named = ["--steps", "--batch-size", "--length"]
        values = [options.steps, options.batch_size, options.length]
        words = [str(word) for pair in zip(named, values, strict=True) for word in pair]
        for _ in range(options.repeats):
            for name, runs in found.items():
                command = [sys.executable, __file__, str(folder), "--run", name, *words]
                own = {"THP_MEM_ALLOC_ENABLE": "1"} if name == "ours" else {}  # as the command line sets it
                environment = {**os.environ, **own}
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
    seconds = {name: median(run["seconds"] for run in runs) for name, runs in found.items()}
    peaks = {name: median(run["peak"] for run in runs) for name, runs in found.items()}
    rows: list[tuple[str, ...]] = [("", "a step", "", "peak memory", "")]
    for name, label in (("stock", "transformers, peft, bitsandbytes"), ("ours", "loftq train")):
        ratios = (f"{seconds[name] / seconds['stock']:.2f}x", f"{peaks[name] / peaks['stock']:.2f}x")
        rows.append((label, f"{seconds[name]:.3f} s", ratios[0], f"{peaks[name] / 1e9:.2f} GB", ratios[1]))
    print(f"\n{options.batch_size} blocks of {options.length} tokens a step, NF4, rank 16; {describe()}")
    print(f"dry run: {planned.memory / 1e9:.2f} GB beside the program\n\n{table(rows)}")


if __name__ == "__main__":
    main()
