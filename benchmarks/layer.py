"""One layer: our solver against the published procedure, and our rounding against bitsandbytes'.

    python benchmarks/layer.py [--quick] [--device cuda]

Prints, for 4096 x 4096 and 4096 x 11008 at rank 16 and 5 iterations, both times, their ratio, and both
relative errors; then the rounding pass and the residual of the loop beside a copy of the same tensor.
The published procedure is run once a shape, since its SVDs take most of a minute; ours is the median of 5.
`--quick` replaces the shapes by 1024 x 1024 and 1024 x 2752.
"""

from __future__ import annotations

import argparse

import torch
from bitsandbytes.functional import quantize_4bit
from machine import SEED, describe, once, seconds, table
from published import published

from loftq.core.blockwise import BlockQuantizer
from loftq.core.solvers.loftq import solve_loftq

RANK, ITERATIONS = 16, 5


def compare_solvers(shapes: list[tuple[int, int]], device: str) -> list[tuple[str, ...]]:
    """Times and errors of both, a row a shape."""
    rows: list[tuple[str, ...]] = [("layer", "published", "loftq", "ratio", "error published", "error loftq", "excess")]
    quantizer = BlockQuantizer("nf4")
    for shape in shapes:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(device) / shape[1] ** 0.5
        found: list[tuple[torch.Tensor, ...]] = []
        slow = once(lambda w=weight, out=found: out.append(published(w, RANK, ITERATIONS)))
        fast = seconds(lambda w=weight: solve_loftq(w, quantizer, RANK, ITERATIONS, 1.0))
        backbone, b, a = found[0]
        norm = weight.double().norm()
        before = float((weight.double() - backbone.double() - b.double() @ a.double()).norm() / norm)
        ours = solve_loftq(weight, quantizer, RANK, ITERATIONS, 1.0)
        rest = weight.double() - quantizer.decode(ours.codes, ours.scales, weight.shape).double()
        after = float((rest - ours.b.double() @ ours.a.double()).norm() / norm)
        rows.append(
            (
                f"{shape[0]} x {shape[1]}",
                f"{slow:.1f} s",
                f"{fast:.3f} s",
                f"{slow / fast:.0f}x",
                f"{before:.5f}",
                f"{after:.5f}",
                f"{after / before - 1:+.3%}",
            )
        )
    return rows


def compare_rounding(shape: tuple[int, int], device: str) -> list[tuple[str, ...]]:
    """One pass over a weight: ours, bitsandbytes', and copies of the tensor."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(device)
    correction = weight / 16
    out = torch.empty_like(weight)
    quantizer = BlockQuantizer("nf4")
    theirs = seconds(lambda: quantize_4bit(weight, quant_type="nf4", blocksize=64), 11)
    ours = seconds(lambda: quantizer.quantize(weight), 11)
    residual = seconds(lambda: quantizer.residual(weight, correction, out), 11)
    copy = seconds(lambda: weight.clone(), 11)
    copy_into = seconds(lambda: out.copy_(weight), 11)
    return [
        (f"one pass over {shape[0]} x {shape[1]}", "time", "beside"),
        ("bitsandbytes rounding", f"{theirs * 1e3:.2f} ms", "1"),
        ("loftq rounding (scales, codes, packed)", f"{ours * 1e3:.2f} ms", f"{theirs / ours:.1f}x faster"),
        ("a copy of the tensor (clone)", f"{copy * 1e3:.2f} ms", "1"),
        (
            "residual: subtract, round, dequantize, subtract",
            f"{residual * 1e3:.2f} ms",
            f"{residual / copy:.2f} copies",
        ),
        ("a copy into memory that is there (copy_)", f"{copy_into * 1e3:.2f} ms", f"{copy_into / copy:.2f} x"),
    ]


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    width = 1024 if options.quick else 4096
    print(describe(options.device), end="\n\n")
    print(table(compare_rounding((width, width), options.device)), end="\n\n", flush=True)
    print(table(compare_solvers([(width, width), (width, width * 43 // 16)], options.device)))


if __name__ == "__main__":
    main()
