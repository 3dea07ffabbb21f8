"""Loss after fine-tuning on GSM8K, from each start, at 2 and at 4 bits.

    python benchmarks/gsm8k.py --data gsm8k_train.jsonl [MODEL] [--bits 4 2] [--rank 16] [--steps 200] [--seeds 0 1 2]
                               [--calibration TEXT] [--work DIR]

Trains an adapter from QLoRA's, LoftQ's and a calibrated start on questions and answers (loss on the answers alone), and
prints the mean loss on 128 held-out examples before and after, with its spread over seeds, which decide the order of
examples and all that a start draws. The rate is that of the three tried (--rates) that serves each start best on the
first seed. What is done is kept in DIR, where a later call finds it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from calibrated import spread
from machine import describe, table
from torch import nn
from transformers import AutoTokenizer, PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.utils import logging

import loftq

HELD_OUT, LONGEST, BATCH = 128, 256, 4
STARTS = ("qlora", "loftq", "calibrated")


def examples(data: Path, tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """Token ids of question and answer, and labels of the answer alone."""
    found = []
    for line in data.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        asked = tokenizer(f"Question: {row['question']}\nAnswer: ").input_ids
        ids = [*asked, *tokenizer(row["answer"]).input_ids, tokenizer.eos_token_id][:LONGEST]
        labels = [-100] * len(asked) + ids[len(asked) :]
        found.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels[: len(ids)])})
    return found


def batched(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Padded on the right to the longest."""
    pad = nn.utils.rnn.pad_sequence
    ids = pad([row["input_ids"] for row in rows], batch_first=True)
    labels = pad([row["labels"] for row in rows], batch_first=True, padding_value=-100)
    mask = pad([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@torch.no_grad()
def loss_of(model: Any, rows: list[dict[str, torch.Tensor]]) -> float:
    """The mean loss a token of the answers."""
    model.eval()
    total = count = 0.0
    for at in range(0, len(rows), 8):
        batch = batched(rows[at : at + 8])
        scored = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * scored
        count += scored
    return total / count


def train(folder: Path, rows: list[dict[str, torch.Tensor]], steps: int, rate: float, seed: int) -> dict[str, float]:
    """Losses before and after."""
    model = loftq.load_qlora(folder, dtype=torch.float32)
    before = loss_of(model, rows[-HELD_OUT:])
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(steps // 20, 1),
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=seed,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows[:-HELD_OUT], data_collator=batched)
        for printing in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printing)
        trainer.train()
    return {"before": before, "after": loss_of(model, rows[-HELD_OUT:])}


def main() -> None:
    """Quantize, train, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4, 5e-4, 1e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--calibration", default="default", help="text for the calibrated start")
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        log = work / "gsm8k.jsonl"
        done = {
            tuple(row["key"]): row for row in map(json.loads, log.read_text().splitlines() if log.is_file() else [])
        }

        def losses(bits: int, method: str, rate: float, seed: int) -> dict[str, float]:
            key = (bits, options.rank, method, options.steps, rate, seed)
            if key not in done:
                folder = work / f"{method}-{bits}-{options.rank}-{seed}"
                if not (folder / "loftq.json").is_file():
                    text = {"calibration": options.calibration, "sequence_length": 512}
                    text |= {"statistics": work / f"statistics-{seed}"}
                    loftq.quantize(
                        options.model,
                        bits=bits,
                        rank=options.rank,
                        method=method,
                        seed=seed,
                        output=folder,
                        quiet=True,
                        **(text if method == "calibrated" else {}),
                    )
                rows = examples(options.data, AutoTokenizer.from_pretrained(folder))
                done[key] = {"key": key, **train(folder, rows, options.steps, rate, seed)}
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(done[key]) + "\n")
                print(*key, f"{done[key]['before']:.4f} -> {done[key]['after']:.4f}", flush=True)
            return done[key]

        lines: list[tuple[str, ...]] = [("bits", "start", "rate", "before", "after")]
        for bits in options.bits:
            for method in STARTS:
                first = options.seeds[0]
                rate = min(options.rates, key=lambda rate: losses(bits, method, rate, first)["after"])
                found = [losses(bits, method, rate, seed) for seed in options.seeds]
                columns = (spread([row[when] for row in found], 4) for when in ("before", "after"))
                lines.append((str(bits), method, f"{rate:g}", *columns))
        print(
            f"\n{options.steps} steps of {BATCH} examples, rank {options.rank}, seeds {options.seeds}; {describe()}\n"
        )
        print(table(lines))


if __name__ == "__main__":
    main()
