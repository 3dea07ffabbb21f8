"""The main job on a real model: quantize it, load it with stock transformers and peft, show what was gained.

    python benchmarks/demo.py [--windows 12] [--data FILE]

Runs `loftq quantize --bits 4 --rank 16 --iter 5` (the default model), loads the folder with the lines of
docs/loading.md, and prints size, weight error and perplexity of full precision, plain NF4 (QLoRA's start, quantized
by bitsandbytes itself) and LoftQ.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from machine import describe, table
from peft import PeftModel
from perplexity import perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

from loftq.display import size
from loftq.formats.artifact import MANIFEST, open_artifact
from loftq.hub.source import find_source
from loftq.planning.settings import SAVE_DIR

COMMAND = ["quantize", "--bits", "4", "--rank", "16", "--iter", "5"]
LENGTH = 512
_NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
    bnb_4bit_use_double_quant=False,
    bnb_4bit_quant_type="nf4",
)


def load_quantized(folder: Path | str) -> torch.nn.Module:
    """Stock loading, and the line that CPUs with AVX512-BF16 need before evaluation."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=_NF4)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def main() -> None:
    """Run, load, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--windows", type=int, default=12, help="windows of 512 tokens")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data" / "shakespeare.txt")
    options = parser.parse_args()
    source = find_source(None)
    folder = Path(SAVE_DIR) / f"{source.label}-4bit-16rank"
    again = ["--overwrite"] if (folder / MANIFEST).is_file() else []
    print(f"$ loftq {' '.join([*COMMAND, *again])}", flush=True)
    subprocess.run([sys.executable, "-m", "loftq_cli.main", *COMMAND, *again], check=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(options.data.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    windows = min(options.windows, tokens.shape[1] // LENGTH)
    totals = open_artifact(folder).manifest["totals"]
    print(f"\nperplexity on {options.data.name}, {windows} windows of {LENGTH} tokens\n{describe()}\n", flush=True)

    full = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.bfloat16)
    exact = perplexity(full, tokens, windows, LENGTH)
    rounded = perplexity(load_quantized(source.folder), tokens, windows, LENGTH)
    model = PeftModel.from_pretrained(load_quantized(folder), folder, subfolder="loftq_init", is_trainable=True)
    start = perplexity(model, tokens, windows, LENGTH)

    backbone, adapter = size(totals["backbone_bytes"]), size(totals["adapter_bytes"])
    gap = (start - exact) / (rounded - exact)
    rows = [
        ("", "size", "weight error", "perplexity", "gap to full precision"),
        ("full precision", size(totals["source_bytes"]), "0", f"{exact:.2f}", "0 %"),
        ("plain NF4 (QLoRA's start)", backbone, f"{totals['plain_error']:.4f}", f"{rounded:.2f}", "100 %"),
        ("LoftQ", f"{backbone} + {adapter}", f"{totals['error']:.4f}", f"{start:.2f}", f"{gap:.0%}"),
    ]
    print(table(rows))


if __name__ == "__main__":
    main()
