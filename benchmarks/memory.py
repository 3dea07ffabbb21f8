"""Peak memory on a checkpoint of Llama-2-7B's shapes, and whether it grows with the number of layers.

    python benchmarks/memory.py [--layers 1 2] [--mixture] [--workers N] [--device cuda]

Writes a synthetic checkpoint in bfloat16 (random values in Llama-2-7B's shapes; 32 layers make the full 13.5 GB),
quantizes it in a process of its own, and prints that process's peak resident memory beside the same process's after its
imports; on a GPU the peak of its memory too. The default run does 1 layer and 2 layers, and prints both.

With `--mixture` the shapes are Qwen3-30B-A3B's, whose layers have 128 experts of 2048 x 768, stored expert by expert,
and there is one iteration instead of five.
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
from small_files import write_small_files
from transformers import LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from loftq.formats.checkpoint import TensorSpec, index_text, lay_out
from loftq.formats.shard_writer import ShardWriter

_RUN = """
import json, sys
import loftq, torch, transformers.models.llama.modeling_llama, loftq.core.kernels.blocks
from loftq.verbs.quantize import quantize
from loftq.solving.report import peak_memory
before = peak_memory(torch.device("cpu"))
workers = int(sys.argv[3]) or None
device = torch.device(sys.argv[4])
report = quantize(sys.argv[1], output=sys.argv[2], workers=workers, device=device, iters=int(sys.argv[5]), quiet=True)
peak = peak_memory(torch.device("cpu"))
print(json.dumps([before, peak, peak_memory(device), report.seconds, report.totals["weights"]]))
"""


def config_of(layers: int, *, mixture: bool) -> PreTrainedConfig:
    """The configuration of Llama-2-7B or Qwen3-30B-A3B with so many layers."""
    if mixture:
        return Qwen3MoeConfig(
            architectures=["Qwen3MoeForCausalLM"],
            vocab_size=151936,
            hidden_size=2048,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
        )
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
    )


def specs(config: Any) -> list[list[TensorSpec]]:
    """The tensors of a model, in groups that lie in one file."""
    width, head = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    experts = getattr(config, "num_experts", 0)

    def spec(name: str, *shape: int) -> list[TensorSpec]:
        return [TensorSpec(f"{name}.weight", torch.bfloat16, shape)]

    groups = [spec("model.embed_tokens", config.vocab_size, width), spec("model.norm", width)]
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes = {
            "q_proj": (queries, width),
            "k_proj": (keys, width),
            "v_proj": (keys, width),
            "o_proj": (width, queries),
        }
        groups += [spec(f"{layer}.self_attn.{name}", *shape) for name, shape in shapes.items()]
        groups += [spec(f"{layer}.{name}_layernorm", width) for name in ("input", "post_attention")]
        inner, owners = config.intermediate_size, [f"{layer}.mlp"]
        if experts:
            inner, owners = config.moe_intermediate_size, [f"{layer}.mlp.experts.{e}" for e in range(experts)]
            groups += [spec(f"{layer}.mlp.gate", experts, width)]
            groups += [spec(f"{layer}.self_attn.{name}_norm", head) for name in "qk"]
        for owner in owners:
            groups += [spec(f"{owner}.{name}_proj", inner, width) for name in ("gate", "up")]
            groups += [spec(f"{owner}.down_proj", width, inner)]
    return [*groups, spec("lm_head", config.vocab_size, width)]


def make_checkpoint(folder: Path, config: PreTrainedConfig, device: str) -> Path:
    """Write the synthetic checkpoint, a tensor at a time, drawn on a device, and a tokenizer that reads bytes."""
    folder.mkdir()
    generator = torch.Generator(device).manual_seed(SEED)
    shards = lay_out(specs(config), 5 * 10**9)
    with ShardWriter(folder, shards) as writer:
        for shard in shards:
            for name, (_, spec) in shard.offsets.items():
                values = torch.randn(spec.shape, generator=generator, device=device) * 0.02
                writer.write(name, values.to("cpu", spec.dtype))
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(index_text(shards))
    write_small_files(folder, config)
    return folder


def main() -> None:
    """Print the peaks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2], help="numbers of layers, one after the other")
    parser.add_argument("--mixture", action="store_true", help="Qwen3-30B-A3B's shapes; 1.2 GB of checkpoint a layer")
    parser.add_argument("--workers", type=int, default=0, help="0: as `loftq quantize` chooses")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    name, iters = ("Qwen3-30B-A3B", 1) if options.mixture else ("Llama-2-7B", 5)
    print(describe(options.device), end="\n\n", flush=True)
    heads = ("weights", "imports", "peak", "above imports", "GPU", "time")
    rows: list[tuple[str, ...]] = [(f"layers of {name}", *heads)]
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as scratch:
            config = config_of(layers, mixture=options.mixture)
            source = make_checkpoint(Path(scratch) / f"{name.lower()}-shapes", config, options.device)
            given = [str(source), f"{scratch}/out", str(options.workers), options.device, str(iters)]
            printed = subprocess.run(
                [sys.executable, "-c", _RUN, *given], check=True, stdout=subprocess.PIPE, text=True
            ).stdout
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
