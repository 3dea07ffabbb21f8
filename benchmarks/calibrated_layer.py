"""One layer of Llama-2-7B's shapes, calibrated and solved: processor seconds of each part.

    python benchmarks/calibrated_layer.py [--width 4096] [--inner 11008] [--tokens 2048] [--length 512] [--rank 16]
                                          [--before CHECKOUT] [--linears down_proj]

Makes a random layer of transformers' Llama, runs it in float32 on random activations, sums up the moments of its
linears' inputs, and solves its seven linears at NF4 by the method `calibrated`, without its refinement. All of it runs
on one thread. Forward pass and moments cost as much for every token, so they are measured on few, and given for 65,536.
`--before` runs another checkout of loftq first, in a process of its own, and prints ratios. `--linears` solves only the
linears of these names.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

from machine import SEED, describe, table

_TOKENS = 65536  # the default of `loftq quantize`
_LAYER = f"""
import json, sys, time
from contextlib import nullcontext
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from loftq.core.grid import Grid
from loftq.core.moments import Moment, assemble
from loftq.core.solvers.calibrated import solve_calibrated
from loftq.core.solvers.methods import METHODS
try:
    from loftq.core.kernels.products import fast_products
except ImportError:
    fast_products = nullcontext
width, inner, tokens, length, rank = map(int, sys.argv[1:6])
wanted = sys.argv[6:]
torch.set_num_threads(1)
torch.manual_seed({SEED})
heads = max(width // 128, 1)
config = LlamaConfig(hidden_size=width, intermediate_size=inner, num_attention_heads=heads, num_hidden_layers=1)
config._attn_implementation = "sdpa"
layer = LlamaDecoderLayer(config, 0).eval()
rotary = LlamaRotaryEmbedding(config)
linears = {{name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}}
inputs = {{}}
for name, module in linears.items():
    torch.nn.init.normal_(module.weight, std=width**-0.5)
    module.register_forward_pre_hook(lambda module, args, name=name: inputs.update({{name: args[0]}}))
states = torch.randn(tokens // length, length, width) * torch.logspace(0.5, -1, width)
states = states + states.roll(1, dims=2) + states.mean(dim=2, keepdim=True)
positions = rotary(states, torch.arange(length)[None])
times = {{"forward": 0.0, "moments": 0.0}}
moments = {{}}

def clock(name, work):
    started = time.process_time()
    found = work()
    times[name] = times.get(name, 0.0) + time.process_time() - started
    return found

def add():
    seen = {{}}
    for name, x in inputs.items():
        if id(x) not in seen:
            seen[id(x)] = moments.setdefault(name, Moment(x.shape[-1]))
            seen[id(x)].add(x)
        moments[name] = seen[id(x)]

with torch.no_grad(), fast_products():
    layer(states[:1, :16], position_embeddings=tuple(each[:, :16] for each in positions))
    for batch in states.split(max(1, 2048 // length)):
        clock("forward", lambda: layer(batch, position_embeddings=positions))
        clock("moments", add)
    quantizer = lambda columns: Grid("nf4").quantizer(columns)
    small = torch.randn(192, 256)
    solve_calibrated(small, quantizer(256), METHODS["calibrated"], small.T @ small, 16, 3, 1.0)  # compiles the loops
    for name, module in linears.items():
        short = name.rpartition(".")[2]
        if wanted and short not in wanted:
            continue
        moment = assemble(moments[name].mean())
        given = module.weight.detach(), quantizer(module.in_features), METHODS["calibrated"], moment, rank, 3, 1.0
        outputs = clock(short, lambda: solve_calibrated(*given)).trace.outputs
        times[f"{{short}} error"] = outputs.final / outputs.weight
print(json.dumps(times))
"""


def measure(options: argparse.Namespace, checkout: str | None) -> dict[str, float]:
    """Processor seconds of the parts, and the errors of outputs that solving leaves."""
    sizes = options.width, options.inner, options.tokens, options.length, options.rank
    environment = {**os.environ, **({"PYTHONPATH": checkout} if checkout else {})}
    command = [sys.executable, "-c", _LAYER, *map(str, sizes), *options.linears]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=checkout)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--linears", nargs="*", default=[], help="names of the linears that are solved  [default: all]")
    parser.add_argument("--before", metavar="CHECKOUT", help="folder of another checkout of loftq")
    options = parser.parse_args()
    print(describe("cpu"), end="\n\n", flush=True)
    found = [measure(options, checkout) for checkout in ([options.before] if options.before else []) + [None]]
    solved = [name for name in found[-1] if f"{name} error" in found[-1]]
    share = _TOKENS / options.tokens
    for times in found:
        times["forward pass of 65,536 tokens"] = times.pop("forward") * share
        times["moments of 65,536 tokens"] = times.pop("moments") * share
        times["solving"] = sum(times[name] for name in solved)
        parts = ("forward pass of 65,536 tokens", "moments of 65,536 tokens", "solving")
        times["all"] = sum(times[name] for name in parts)
    heads = ("before", "now", "ratio", "errors of outputs") if options.before else ("now", "error of outputs")
    rows: list[tuple[str, ...]] = [(f"{options.width} and {options.inner} wide, rank {options.rank}", *heads)]
    for name in [*solved, "solving", "forward pass of 65,536 tokens", "moments of 65,536 tokens", "all"]:
        errors = ", ".join(f"{times[f'{name} error']:.5f}" for times in found if f"{name} error" in times)
        seconds = [f"{times[name]:.1f} s" for times in found]
        ratio = [f"{found[-1][name] / found[0][name]:.2f}"] if options.before else []
        rows.append((name, *seconds, *ratio, errors))
    print(table(rows))


if __name__ == "__main__":
    main()
