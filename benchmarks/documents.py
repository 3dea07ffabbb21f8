"""Peak memory of reading one long document and cutting it into blocks to train on.

    python benchmarks/documents.py [--megabytes 4 50] [--kinds lines line row cell]

Writes Shakespeare's text again and again into a file with many lines (`lines`) or a single one (`line`), into a row
of a `.jsonl` file (`row`), or into a cell of a `.csv` file (`cell`); `x` repeats one letter. Reads it as `loftq train
--task clm` does, in a process of its own, and prints that process's peak resident memory beside the same process's
after its imports. The tokenizer is a byte-level BPE that is trained on the same text.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import describe, table

_TEXT = Path(__file__).parent / "data" / "shakespeare.txt"
_RUN = """
import json, resource, sys, time
import datasets, transformers
from loftq.training.data import read_rows
from loftq.training.encoding import Encoder
from loftq.training.tasks import TRAINING_TASKS
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
datasets.disable_progress_bars()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=sys.argv[2])
tokenizer("warm")
before, start = peak(), time.perf_counter()
rows = read_rows([sys.argv[1]])
read = peak()
blocks = TRAINING_TASKS["clm"].encode(rows, {}, Encoder(tokenizer, "causal-lm", 1024))
print(json.dumps([before, read, peak(), len(blocks) * len(blocks[0]["input_ids"]), time.perf_counter() - start]))
"""


def write_document(kind: str, megabytes: float, folder: Path) -> Path:
    """Write a document of about so many megabytes."""
    piece = _TEXT.read_text(encoding="utf-8")
    piece = {"lines": piece, "x": "x" * len(piece)}.get(kind, piece.replace("\n", " "))
    text = piece * round(megabytes * 1e6 / len(piece.encode()) + 0.5)
    text = text[: round(megabytes * 1e6)]
    if kind == "row":
        path, content = folder / "document.jsonl", json.dumps({"text": text}) + "\n"
    elif kind == "cell":
        path, content = folder / "document.csv", 'text\n"' + text.replace('"', '""') + '"\n'
    else:
        path, content = folder / "document.txt", text
    path.write_text(content, encoding="utf-8")
    return path


def train_tokenizer(path: Path) -> None:
    """Train a tokenizer on the text, and write it into a file."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([_TEXT.read_text(encoding="utf-8"), "xxxx xxxx xxxxxxxx " * 50], trainer)
    tokenizer.save(str(path))


def measure(path: Path, tokenizer: Path) -> list[float]:
    """Megabytes after the imports, after reading, and at the peak; the number of tokens; seconds."""
    with tempfile.TemporaryDirectory() as cache:
        ended = subprocess.run(
            [sys.executable, "-c", _RUN, str(path), str(tokenizer)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_DATASETS_CACHE": cache},
        )
    figures: list[float] = json.loads(ended.stdout)
    return figures


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[4, 50])
    parser.add_argument("--kinds", nargs="+", default=["lines", "line", "row", "cell"])
    options = parser.parse_args()
    rows = [["document", "MB", "imports MB", "read MB", "peak MB", "tokens", "s"]]
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = Path(temporary) / "tokenizer.json"
        train_tokenizer(tokenizer)
        for kind in options.kinds:
            for megabytes in options.megabytes:
                path = write_document(kind, megabytes, Path(temporary))
                before, read, peak, tokens, seconds = measure(path, tokenizer)
                figures = [f"{megabytes:g}", f"{before:.0f}", f"{read:.0f}", f"{peak:.0f}"]
                rows.append([kind, *figures, f"{tokens:.0f}", f"{seconds:.1f}"])
                path.unlink()
    print(describe())
    print(table(rows))


if __name__ == "__main__":
    main()
