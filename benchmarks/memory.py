"""Peak memory on a checkpoint of Llama-2-7B's shapes, and whether it grows with the number of layers.

    python benchmarks/memory.py [--layers 2] [--all] [--workers N] [--device cuda]

Writes a synthetic checkpoint in bfloat16 (random values in Llama-2-7B's shapes, `--all` makes the full
13.5 GB), quantizes it in a process of its own, and prints that process's peak resident memory beside the
same process's after its imports; on a GPU the peak of its memory too. The default run does 1 layer and 2 layers, and
prints both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from llama_files import write_small_files
from machine import SEED, describe, table

from loftq.formats.checkpoint import TensorSpec, index_text, lay_out
from loftq.formats.shard_writer import ShardWriter

_HIDDEN, _INNER, _VOCABULARY = 4096, 11008, 32000
_RUN = """
import json, sys
import loftq, torch, transformers.models.llama.modeling_llama, loftq.core.kernels.blocks
from loftq.verbs.quantize import quantize
from loftq.solving.report import peak_memory
before = peak_memory(torch.device("cpu"))
workers = int(sys.argv[3]) or None
device = torch.device(sys.argv[4])
report = quantize(sys.argv[1], output=sys.argv[2], workers=workers, device=device, quiet=True)
peak = peak_memory(torch.device("cpu"))
print(json.dumps([before, peak, peak_memory(device), report.seconds, report.totals["weights"]]))
"""


def specs(layers: int) -> list[list[TensorSpec]]:
    """The tensors of a Llama-2-7B with so many layers."""

    def spec(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name, torch.bfloat16, shape)

    groups = [[spec("model.embed_tokens.weight", _VOCABULARY, _HIDDEN)]]
    for i in range(layers):
        layer = f"model.layers.{i}"
        groups += [[spec(f"{layer}.self_attn.{name}_proj.weight", _HIDDEN, _HIDDEN)] for name in "qkvo"]
        groups += [[spec(f"{layer}.mlp.{name}_proj.weight", _INNER, _HIDDEN)] for name in ("gate", "up")]
        groups += [[spec(f"{layer}.mlp.down_proj.weight", _HIDDEN, _INNER)]]
        groups += [[spec(f"{layer}.{name}_layernorm.weight", _HIDDEN)] for name in ("input", "post_attention")]
    return [*groups, [spec("model.norm.weight", _HIDDEN)], [spec("lm_head.weight", _VOCABULARY, _HIDDEN)]]


def make_checkpoint(folder: Path, layers: int, device: str) -> Path:
    """Write the synthetic checkpoint, a tensor at a time, drawn on a device, and a tokenizer that reads bytes."""
    folder.mkdir()
    generator = torch.Generator(device).manual_seed(SEED)
    shards = lay_out(specs(layers), 5 * 10**9)
    with ShardWriter(folder, shards) as writer:
        for shard in shards:
            for name, (_, spec) in shard.offsets.items():
                values = torch.randn(spec.shape, generator=generator, device=device) * 0.02
                writer.write(name, values.to("cpu", spec.dtype))
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(index_text(shards))
    write_small_files(
        folder,
        hidden_size=_HIDDEN,
        intermediate_size=_INNER,
        vocab_size=_VOCABULARY,
        num_hidden_layers=layers,
        num_attention_heads=32,
    )
    return folder


def main() -> None:
    """Print the peaks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--all", action="store_true", help="32 layers: 13.5 GB of checkpoint")
    parser.add_argument("--workers", type=int, default=0, help="0: as `loftq quantize` chooses")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    counts = [1, 32 if options.all else options.layers]
    print(describe(options.device), end="\n\n", flush=True)
    heads = ("weights", "imports", "peak", "above imports", "GPU", "time")
    rows: list[tuple[str, ...]] = [("layers of Llama-2-7B", *heads)]
    for layers in counts:
        with tempfile.TemporaryDirectory() as scratch:
            source = make_checkpoint(Path(scratch) / "llama-2-7b-shapes", layers, options.device)
            command = [sys.executable, "-c", _RUN, str(source), f"{scratch}/out", str(options.workers), options.device]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        before, peak, gpu, taken, weights = json.loads(printed.splitlines()[-1])
        rows.append(
            (
                str(layers),
                f"{weights / 1e6:.0f} M",
                f"{before / 1e9:.2f} GB",
                f"{peak / 1e9:.2f} GB",
                f"{(peak - before) / 1e9:.2f} GB",
                "" if options.device == "cpu" else f"{gpu / 1e9:.2f} GB",
                f"{taken:.0f} s",
            )
        )
    print(table(rows))


if __name__ == "__main__":
    main()
