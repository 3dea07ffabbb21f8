"""Trains the tables of the trellis code that loftq ships.

    python benchmarks/trellis_tables.py [--lengths 10 12] [--write] [--rounds 20]

A table begins as a random order of the quantiles of a Gaussian. Then Viterbi's algorithm codes Gaussian samples, and
each state's level becomes the mean of the samples that it coded (generalized Lloyd). Prints the mean squared error of
each width on other samples, beside the rate-distortion limit 4^-b. A length is the number of bits of a state. With
--write, replaces the files in loftq/core/data.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from machine import describe, table
from scipy.special import ndtri

from loftq.core.kernels.viterbi import Search
from loftq.core.trellis import LENGTHS, WIDEST

SAMPLES, COLUMN = 1 << 16, 1 << 12
FOLDER = Path(__file__).parents[1] / "loftq/core/data"


def coded(search: Search, samples: np.ndarray, levels: np.ndarray, width: int) -> np.ndarray:
    """The states of samples, in columns."""
    return np.concatenate(
        [search(column, np.ones_like(column), levels, width).copy() for column in samples.reshape(-1, COLUMN)]
    )


def train(width: int, length: int, rounds: int) -> tuple[np.ndarray, float]:
    """The levels of a width as float32, and their mean squared error on samples that they were not trained on."""
    random = np.random.default_rng(width)
    count = 1 << length
    levels = (0.97 * ndtri((np.arange(count) + 0.5) / count))[random.permutation(count)].astype(np.float32)
    search = Search(COLUMN, length)
    for _ in range(rounds):
        samples = random.standard_normal(SAMPLES).astype(np.float32)
        states = coded(search, samples, levels, width)
        sums = np.bincount(states, samples, count) + 2 * levels  # two pseudo-counts of the old level
        levels = (sums / (np.bincount(states, minlength=count) + 2)).astype(np.float16).astype(np.float32)
    samples = random.standard_normal(SAMPLES).astype(np.float32)
    error = samples - levels[coded(search, samples, levels, width)]
    return levels, float((error**2).mean())


def main() -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    rows: list[tuple[str, ...]] = [("states", "bits", "mean squared error", "limit")]
    for length in options.lengths:
        trained = [train(width, length, options.rounds) for width in range(1, WIDEST + 1)]
        if options.write:
            np.save(FOLDER / f"trellis-{length}.npy", np.stack([levels for levels, _ in trained]).astype(np.float16))
        rows += [
            (str(1 << length), str(width), f"{error:.5f}", f"{4.0**-width:.5f}")
            for width, (_, error) in enumerate(trained, 1)
        ]
    print(f"{options.rounds} rounds of {SAMPLES} samples\n{describe()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
