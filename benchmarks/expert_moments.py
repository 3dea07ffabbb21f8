"""Which moment of an expert's inputs is best: the mixture of mixture.py from calibrated starts, without distillation.

    python benchmarks/mixture.py --data FILE [FILE ...] --work DIR
    python benchmarks/expert_moments.py --work DIR [--tokens 4096 16384] [--starts nf2 nf4] [--rank 16]

An expert's own tokens count equally, by their weight in the router, or by its square; its moment leans on the tokens of
the layer as if κ of them had reached it, where κ is a multiple of the number of inputs. The linears of attention are
calibrated in every variant. Prints perplexity as a multiple of full precision's, and KL, on 24 windows of 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from calibrated import LENGTH, Bench
from machine import describe, table
from transformers.utils import logging

import loftq
from loftq.core.moments import weighted_moment
from loftq.solving import expert_inputs

Moment = torch.Tensor | None
VARIANTS: dict[str, tuple[float | None, float, bool]] = {  # power of the router's weight, κ, and κ for down_proj too
    "none: experts are solved without text": (None, 0.0, True),
    "the layer's tokens alone": (0.0, float("inf"), True),
    "own tokens, equally": (0.0, 0.0, True),
    "own tokens, by weight": (1.0, 0.0, True),
    "own tokens, by weight squared": (2.0, 0.0, True),
    "by weight squared, 0.25 in": (2.0, 0.25, True),
    "by weight squared, 1 in": (2.0, 1.0, True),
    "by weight squared, 1 in, not for down_proj": (2.0, 1.0, False),
    "by weight squared, 4 in": (2.0, 4.0, True),
    "equally, 1 in": (0.0, 1.0, True),
}


def variant(power: float | None, prior: float, everywhere: bool) -> type[expert_inputs.ExpertInputs]:
    """The class that gives the moments of a variant."""

    class Inputs(expert_inputs.ExpertInputs):
        def moment(self, expert: int) -> Any:
            through = None if self._first is None else self._first.next(self._device)
            if power is None:
                return None
            rows, choices = torch.nonzero(self._routed.experts == expert, as_tuple=True)
            kappa = prior * self._layer.matrix[1] if everywhere or through is None else 0.0
            shared = self._all if through is None else weighted_moment(through(self._sample), self._equal)
            if not len(rows) or kappa == float("inf"):
                return shared.float()
            tokens, weights = self._tokens(rows), self._routed.weights[rows, choices] ** power
            own = weighted_moment(tokens if through is None else through(tokens), weights)
            return ((len(rows) * own + kappa * shared) / (len(rows) + kappa)).float()

    return Inputs


def measured(bench: Bench, kind: str, rank: int, tokens: int, name: str) -> dict[str, float]:
    """Perplexity and divergence of a start."""
    original = expert_inputs.ExpertInputs
    expert_inputs.ExpertInputs = variant(*VARIANTS[name])  # type: ignore[misc]
    try:
        with tempfile.TemporaryDirectory(dir=bench.work) as folder:
            loftq.quantize(
                bench.model,
                output=f"{folder}/out",
                bits=float(kind.removeprefix("nf")),
                rank=rank,
                calibration=str(bench.work / "calibration.txt"),
                calibration_tokens=tokens,
                sequence_length=LENGTH,
                statistics=str(bench.work / f"moments-{tokens}"),
                refine=0,
                quiet=True,
            )
            model = loftq.load_qlora(f"{folder}/out", is_trainable=False, device_map="cpu", dtype=torch.float32)
            return bench.measure(model)
    finally:
        expert_inputs.ExpertInputs = original  # type: ignore[misc]


def main() -> None:
    """Quantize, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--starts", nargs="+", default=["nf2", "nf4"])
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bench = Bench(str(options.work / "model"), options.work / "mixed.txt", options.work)
    exact = bench.exact()
    cells = [(kind, tokens) for kind in options.starts for tokens in options.tokens]
    heads = [f"{kind.upper()}, {tokens:,} tokens" for kind, tokens in cells]
    rows: list[tuple[str, ...]] = [("moment of an expert", *heads)]
    for name in VARIANTS:
        found = [measured(bench, kind, options.rank, tokens, name) for kind, tokens in cells]
        rows.append((name, *(f"{row['perplexity'] / exact:.4f}, KL {row['kl']:.5f}" for row in found)))
        print(json.dumps(rows[-1]), flush=True)
    print(f"\nrank {options.rank}, of experts 4; full precision {exact:.3f}\n{describe()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
