"""What `--dry-run` says of Llama-3's shapes with 70 and 405 billion weights: memory, and with a cluster the time.

    python benchmarks/cluster_plan.py [--layers 80 126] [--cluster auto] [--device cuda] [--tokens 65536]

The checkpoints are files of headers with holes in the place of the weights, which a dry run does not read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import describe, table
from memory import specs
from small_files import write_small_files
from transformers import LlamaConfig

from loftq.display import size
from loftq.formats.checkpoint import index_text, lay_out

SHAPES = {80: (8192, 28672, 64), 126: (16384, 53248, 128)}  # width, inner width and heads by the number of layers


def make_hollow(folder: Path, layers: int) -> Path:
    """Write the headers of a checkpoint, and a hole for each weight."""
    width, inner, heads = SHAPES[layers]
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
    )
    folder.mkdir()
    shards = lay_out(specs(config), 5 * 10**9)
    for shard in shards:
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
    (folder / "model.safetensors.index.json").write_text(index_text(shards))
    write_small_files(folder, config)
    return folder


def plan(folder: Path, *arguments: str) -> dict[str, Any] | str:
    """What the dry run reports, or its line if the cluster is too small."""
    command = [sys.executable, "-m", "loftq_cli.main", "quantize", str(folder), *arguments, "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Plan, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--cluster")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=65536)
    options = parser.parse_args()
    text = ["--calibration", "default", "--calibration-tokens", str(options.tokens), "--refine", "0"]
    where = ["--device", options.device, *(["--cluster", options.cluster] if options.cluster else ["--workers", "1"])]
    rows: list[tuple[str, ...]] = [("", "weights", "backbone", "memory of a task", "time on this cluster")]
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as scratch:
            folder = make_hollow(Path(scratch) / f"llama-{layers}-layers", layers)
            for name, more in (("LoftQ", []), (f"calibrated, {options.tokens} tokens", text)):
                found = plan(folder, *where, *more)
                if isinstance(found, str):
                    print(f"{layers} layers, {name}: {found}\n")
                    continue
                parts = ", ".join(f"{key} {size(value)}" for key, value in found["memory_bytes_of_parts"].items())
                seconds = found.get("cluster", {}).get("seconds_of_parts", {})
                times = ", ".join(f"{key} {value / 3600:.2f} h" for key, value in seconds.items())
                totals = found["totals"]
                shown = f"{totals['weights'] / 1e9:.1f} G", size(totals["backbone_bytes"])
                rows.append((f"{layers} layers, {name}", *shown, parts, times))
    print(f"{table(rows)}\n\n{describe('cpu')}")


if __name__ == "__main__":
    main()
