"""The packed linear against bitsandbytes' NF4: forward and backward on this machine.

    python benchmarks/packed.py [--side 4096] [--device cuda] [--without-triton] [--types nf2 tcq2 ...]

Prints, for 1, 128 and 1024 tokens in bfloat16, the time of a forward and backward pass through one frozen linear of
bitsandbytes, and of ours as multiples of it: codebooks, integers with floating zero-points in groups of 64, GPTQ's
layout, and trellis codes. Rounds alternate; medians of 9 are compared, on a GPU of 9 times 20 passes. Then it prints
the processor time of a thread for each weight: for decoding and, by number of states, for coding a trellis code.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from machine import SEED, describe, once, table

from loftq.core import trellis
from loftq.core.codebooks import INTEGERS, TABLES
from loftq.core.grid import ROW, Grid
from loftq.core.kernels import dispatch, viterbi
from loftq.models.gptq_linear import GptqLinear
from loftq.models.packed_linear import PackedLinear
from loftq.models.trellis_linears import TrellisLinear

ROUNDS = 9
TRELLIS = ("tcq2", "tcq2.25", "tcq2.5", "tcq3", "tcq4")
LENGTHS = (8, 10, 12)  # bits of a state
STEPS = 4096  # outputs of a column that is coded


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


def trellis_linear(side: int, name: str) -> torch.nn.Module:
    """Random codes, in columns of the two widths around the budget."""
    layer = TrellisLinear(side, side, False, grid=Grid(name, ROW))
    stored = layer.state_dict()
    stored["weight"].random_(-(2**31), 2**31)
    bits = layer.grid.bits
    stored["weight_widths"].fill_(int(bits))
    stored["weight_widths"][torch.randperm(side)[: trellis.total_bits(side, bits) - int(bits) * side]] += 1
    for scales in ("weight_rows", "weight_columns"):
        stored[scales].uniform_(0.5, 1.5)
    return layer


def processor_time(work: Callable[[], object]) -> float:
    """The least processor time of this process for one of several calls."""
    work()
    taken = []
    for _ in range(5):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return min(taken)


def of_a_weight(side: int) -> list[tuple[str, ...]]:
    """Processor times of decoding and coding on one thread, in nanoseconds for a weight."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[tuple[str, ...]] = [("one weight, one thread", "decoding", *(f"coding, L = {n}" for n in LENGTHS))]
    target, weights = np.random.default_rng(SEED).standard_normal(STEPS).astype(np.float32), np.ones(STEPS, np.float32)
    for name in TRELLIS:
        layer = trellis_linear(side, name)
        cells = [processor_time(lambda: layer.dequantize(torch.bfloat16)) / side**2]  # noqa: B023
        width = int(layer.grid.bits)
        for length in LENGTHS if layer.grid.bits == width else ():
            table = np.random.default_rng(SEED).standard_normal(1 << length).astype(np.float32)
            search = viterbi.Search(STEPS, length)
            cells.append(processor_time(lambda: search(target, weights, table, width)) / STEPS)  # noqa: B023
        rows.append((name, *(f"{cell * 1e9:.3g} ns" for cell in cells), *[""] * (1 + len(LENGTHS) - len(cells))))
    torch.set_num_threads(threads)
    return rows


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
    parser.add_argument("--types", nargs="+", help="only these of ours")
    options = parser.parse_args()
    dispatch.HAS_TRITON = dispatch.HAS_TRITON and not options.without_triton
    side, device = options.side, options.device
    count = 1 if device == "cpu" else 20
    torch.manual_seed(SEED)
    makers: dict[str, Callable[[], torch.nn.Module]] = {
        **{f"loftq {name}": partial(packed_linear, side, name) for name in (*TABLES, *INTEGERS)},
        **{f"gptq {name}": partial(packed_linear, side, name, GptqLinear) for name in INTEGERS},
        **{f"loftq {name}": partial(trellis_linear, side, name) for name in TRELLIS},
    }
    chosen = {name: make for name, make in makers.items() if not options.types or name.split()[1] in options.types}
    layers = {"bitsandbytes nf4": bitsandbytes_linear(side, device), **{name: make() for name, make in chosen.items()}}
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
    if device == "cpu":
        print("\n" + table(of_a_weight(side)))


if __name__ == "__main__":
    main()
