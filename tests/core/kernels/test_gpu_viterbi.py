"""The search on a GPU, in Triton's interpreter. Oracles: the CPU's search, which finds the best path; the trellis."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from loftq.core.kernels import viterbi

LENGTH = 6  # bits of a state: the interpreter is slow


@pytest.fixture(autouse=True)
def interpreter() -> None:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("with a GPU kernels are compiled for it: test_cuda_*.py run them")


def problem(steps: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A column, the weights of its steps, and a table of levels."""
    random = np.random.default_rng(seed)
    weights = random.random(steps).astype(np.float32) + 0.2
    return random.standard_normal(steps).astype(np.float32), weights, random.standard_normal(64).astype(np.float32)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
@pytest.mark.parametrize("steps", [1, 20, 150])
def test_a_single_chunk_gets_the_best_path(width: int, steps: int) -> None:
    from loftq.core.kernels.gpu_viterbi import Search

    x, weights, table = problem(steps)
    expected = viterbi.Search(steps, LENGTH)(x, weights, table, width)
    search = Search(steps, LENGTH, torch.device("cpu"))
    found = search(*map(torch.from_numpy, (x, weights, table)), width)
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("steps", [161, 300, 420])
def test_several_chunks_are_one_path_that_is_hardly_worse(width: int, steps: int) -> None:
    from loftq.core.kernels.gpu_viterbi import CHUNK, OVERLAP, Search

    x, weights, table = problem(steps)
    best = viterbi.Search(steps, LENGTH)(x, weights, table, width)
    search = Search(steps, LENGTH, torch.device("cpu"))
    path = search(*map(torch.from_numpy, (x, weights, table)), width).int().numpy()
    assert steps > CHUNK + OVERLAP
    assert len(path) == steps
    assert all(path[t] >> width == path[t + 1] & ((1 << (LENGTH - width)) - 1) for t in range(steps - 1))
    errors = [float((weights * (x - table[states]) ** 2).sum()) for states in (path, best)]
    assert errors[1] <= errors[0] < 1.005 * errors[1]
