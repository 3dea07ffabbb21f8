"""The packed linear against bitsandbytes' NF4: forward and backward on this machine.

    python benchmarks/packed.py [--side 4096]

Prints, for 1, 128 and 1024 tokens in bfloat16, the time of a forward and backward pass through one frozen linear
of bitsandbytes, and ours at 2, 3 and 4 bits as multiples of it. Rounds alternate; medians of 9 are compared.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from machine import SEED, describe, table

from loftq.models.packed_linear import PackedLinear

ROUNDS = 9


def bitsandbytes_linear(side: int) -> torch.nn.Module:
    """NF4 as it is trained: without the CPU's repacking, which breaks gradients."""
    options = {"quant_type": "nf4", "compress_statistics": False}
    layer = Linear4bit(side, side, bias=False, compute_dtype=torch.bfloat16, **options)
    weight = torch.randn(side, side) / side**0.5
    layer.weight = Params4bit(weight, requires_grad=False, **options).to("cpu")
    layer.support_avx512bf16_for_cpu = False
    return layer


def packed_linear(side: int, codebook: str) -> torch.nn.Module:
    """Random codes and scales: what they are makes no difference to the time."""
    layer = PackedLinear(side, side, False, codebook=codebook)
    layer.weight.data.random_(0, 256)
    layer.weight_scales.uniform_(0.01, 0.02)
    return layer


def once(layer: torch.nn.Module, inputs: torch.Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    inputs = inputs.clone().requires_grad_()
    started = time.perf_counter()
    layer(inputs).sum().backward()
    return time.perf_counter() - started


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--side", type=int, default=4096)
    side = parser.parse_args().side
    torch.manual_seed(SEED)
    layers = {
        "bitsandbytes nf4": bitsandbytes_linear(side),
        **{f"loftq {name}": packed_linear(side, name) for name in ("nf2", "nf3", "nf4")},
    }
    rows: list[tuple[str, ...]] = [(f"forward + backward, {side} x {side}", *layers)]
    for tokens in (1, 128, 1024):
        inputs = torch.randn(tokens, side).bfloat16()
        times: dict[str, list[float]] = {name: [] for name in layers}
        for turn in range(ROUNDS + 1):
            for name, layer in layers.items():
                taken = once(layer, inputs)
                if turn:
                    times[name].append(taken)
        base, *ours = (median(found) for found in times.values())
        label = f"{tokens} token{'s' if tokens > 1 else ''}"
        rows.append((label, f"{base * 1e3:.1f} ms", *(f"{found / base:.2f}x" for found in ours)))
    print(describe(), end="\n\n")
    print(table(rows))


if __name__ == "__main__":
    main()
