"""The memory that training Qwen3-30B-A3B needs by the dry run, with its experts on the device and in main memory.

    python benchmarks/offload.py [--bits 4 2] [--tokens 1024] [--layers 48]

Writes the headers of the whole checkpoint, without the bytes of its 61 GB, which the dry run does not read. Rank 16 (4
for experts), one example a step, gradient checkpointing, and an optimizer of 8 bits. On a machine without a GPU the dry
run counts half more for activations than on a GPU, because of the heap of a process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from machine import describe, table
from memory import config_of, specs
from small_files import write_small_files

from loftq.formats.checkpoint import index_text, lay_out
from loftq.training.estimate import estimate


def write_headers(folder: Path, layers: int) -> Path:
    """Write a checkpoint whose files have headers and, as far as they take up space on the disk, nothing else."""
    folder.mkdir()
    config = config_of(layers, mixture=True)
    write_small_files(folder, config)
    shards = lay_out(specs(config), 4 * 10**9)
    for shard in shards:
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
    (folder / "model.safetensors.index.json").write_text(index_text(shards))
    return folder


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=48)
    options = parser.parse_args()
    print(describe(), end="\n\n", flush=True)
    heads = ("weights", "adapter", "activations", "unpacked", "on the device", "in main memory")
    rows: list[tuple[str, ...]] = [(f"{options.layers} layers, {options.tokens} tokens", *heads)]
    with tempfile.TemporaryDirectory() as scratch:
        model, data = write_headers(Path(scratch) / "qwen3-30b-a3b", options.layers), Path(scratch) / "data.jsonl"
        row = {"prompt": "Rain?", "response": "It rained. " * options.tokens}
        data.write_text((json.dumps(row) + "\n") * 9)
        for bits in options.bits:
            for offload in (None, "experts"):
                counted = estimate(
                    str(model),
                    data=str(data),
                    output=f"{scratch}/out",
                    bits=bits,
                    rank=16,
                    batch_size=1,
                    cutoff_len=options.tokens,
                    gradient_checkpointing=True,
                    optim="paged_adamw_8bit",
                    dtype="bfloat16",
                    offload=offload,
                )
                figures = (counted.weights, counted.adapter, counted.activations, counted.experts, counted.memory)
                shown = [f"{figure / 1e9:.2f} GB" for figure in (*figures, counted.offloaded)]
                rows.append((f"{bits} bits{', --offload experts' if offload else ''}", *shown))
    print(table(rows))


if __name__ == "__main__":
    main()
