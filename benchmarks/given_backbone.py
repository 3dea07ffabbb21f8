"""What an adapter for somebody's quantized model is worth before any training.

    python benchmarks/given_backbone.py --data FILE [MODEL] [--rank 16] [--windows 12] [--tokens 65536] [--work DIR]

The model is quantized by transformers and bitsandbytes (NF4, double quantization, as many repositories on the Hub are),
and loftq computes adapters for it: by the weights alone, and calibrated on the first half of FILE. The second half is
evaluated: windows of 512 tokens, in bfloat16. Prints perplexities, and the time of each run.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import describe, table
from peft import PeftModel
from perplexity import perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

import loftq
from loftq.hub.source import find_source
from loftq.models.loading import guard_cpu

LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=65536, help="tokens to calibrate on")
    parser.add_argument("--work", type=Path, default=None)
    asked = parser.parse_args()
    logging.set_verbosity_error()
    work = asked.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    source = find_source(asked.model).folder
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = asked.data.read_text(encoding="utf-8")
    (work / "calibration.txt").write_text(text[: len(text) // 2], encoding="utf-8")
    ids = tokenizer(text[len(text) // 2 :], return_tensors="pt").input_ids

    def measured(model: Any) -> str:
        return f"{perplexity(model, ids, asked.windows, LENGTH):.2f}"

    quantized = work / "nf4"
    if not quantized.is_dir():
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
        model.save_pretrained(quantized)
        tokenizer.save_pretrained(quantized)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    rows: list[tuple[str, ...]] = [("", "perplexity", "time"), ("full precision", measured(dense), "")]
    base = AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.bfloat16).eval()
    guard_cpu(base)
    rows.append(("bitsandbytes NF4", measured(base), ""))
    texts: dict[str, Any] = {"by the weights": {}, "calibrated": {"calibration": work / "calibration.txt"}}
    texts["calibrated"]["calibration_tokens"] = asked.tokens
    for name, options in texts.items():
        folder = work / name.replace(" ", "-")
        settings = {"rank": asked.rank, "output": folder, "overwrite": True, **options}
        report = loftq.quantize(str(source), backbone=quantized, **settings)
        base = AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.bfloat16)
        guard_cpu(base)
        model = PeftModel.from_pretrained(base, folder, subfolder="loftq_init").eval()
        rows.append((f"with an adapter, {name}", measured(model), f"{report.seconds:.0f} s"))
    print(describe())
    print(table(rows))


if __name__ == "__main__":
    main()
