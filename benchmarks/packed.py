"""The packed linear against bitsandbytes' NF4: forward and backward on this machine.

    python benchmarks/packed.py [--side 4096] [--device cuda] [--without-triton]

Prints, for 1, 128 and 1024 tokens in bfloat16, the time of a forward and backward pass through one frozen linear of
bitsandbytes, and of ours as multiples of it: codebooks, integers with floating zero-points in groups of 64, and GPTQ's
layout. Rounds alternate; medians of 9 are compared, on a GPU of 9 times 20 passes.
"""

from __future__ import annotations

import argparse
from statistics import median

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from machine import SEED, describe, once, table

from loftq.core.codebooks import CODEBOOKS, INTEGERS, TABLES
from loftq.core.grid import Grid
from loftq.core.kernels import dispatch
from loftq.models.gptq_linear import GptqLinear
from loftq.models.packed_linear import PackedLinear

ROUNDS = 9


def bitsandbytes_linear(side: int, device: str) -> torch.nn.Module:
    """NF4 as it is trained: without the CPU's repacking, which breaks gradients."""
    options = {"quant_type": "nf4", "compress_statistics": False}
    layer = Linear4bit(side, side, bias=False, compute_dtype=torch.bfloat16, **options)
    weight = torch.randn(side, side) / side**0.5
    layer.weight = Params4bit(weight, requires_grad=False, **options).to(device)
    layer.support_avx512bf16_for_cpu = False
    return layer


def packed_linear(side: int, codebook: str, kind: type[PackedLinear] = PackedLinear) -> torch.nn.Module:
    """Random codes and scales: what they are makes no difference to the time."""
    zero_point = None if codebook in TABLES else "integer" if kind is GptqLinear else "float"
    layer = kind(side, side, False, grid=Grid(codebook, zero_point=zero_point))
    for tensor in layer.state_dict().values():
        tensor.uniform_(0.01, 0.02) if tensor.is_floating_point() else tensor.random_(0, 256)
    return layer


def passes(layer: torch.nn.Module, inputs: torch.Tensor, count: int) -> float:
    """Seconds of a forward and a backward pass, the mean of `count`."""
    inputs = inputs.clone().requires_grad_()
    gradient = torch.ones_like(inputs)

    def work() -> None:
        for _ in range(count):
            layer(inputs).backward(gradient)

    return once(work) / count


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--without-triton", action="store_true", help="on a GPU, by torch's own operators")
    options = parser.parse_args()
    dispatch.HAS_TRITON = dispatch.HAS_TRITON and not options.without_triton
    side, device = options.side, options.device
    count = 1 if device == "cpu" else 20
    torch.manual_seed(SEED)
    layers = {
        "bitsandbytes nf4": bitsandbytes_linear(side, device),
        **{f"loftq {name}": packed_linear(side, name) for name in CODEBOOKS},
        **{f"gptq {name}": packed_linear(side, name, GptqLinear) for name in INTEGERS},
    }
    for layer in layers.values():
        layer.to(device)
    labels = {1: "1 token", 128: "128 tokens", 1024: "1024 tokens"}
    columns: list[list[str]] = []
    for tokens in labels:
        inputs = torch.randn(tokens, side, device=device).bfloat16()
        times: dict[str, list[float]] = {name: [] for name in layers}
        for turn in range(ROUNDS + 1):
            for name, layer in layers.items():
                taken = passes(layer, inputs, count)
                if turn:
                    times[name].append(taken)
        base, *ours = (median(found) for found in times.values())
        digits = 1 if device == "cpu" else 3
        columns.append([f"{base * 1e3:.{digits}f} ms", *(f"{found / base:.2f}x" for found in ours)])
    rows = [(f"forward + backward, {side} x {side}", *labels.values())]
    rows += [(name, *cells) for name, *cells in zip(layers, *columns, strict=True)]
    print(describe(device), end="\n\n")
    print(table(rows))


if __name__ == "__main__":
    main()
