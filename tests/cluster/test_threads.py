"""The numbers of threads of a process are those of another after `use`."""

from __future__ import annotations

import pytest
import torch

from loftq.cluster.threads import Threads, threads_here

pytest.importorskip("threadpoolctl")


def test_a_process_computes_with_the_numbers_of_another() -> None:
    """Oracle: torch and threadpoolctl, asked again."""
    before = threads_here()
    try:
        Threads(2, 2).use()
        assert threads_here() == Threads(2, 2)
        Threads(1, 1).use()
        assert threads_here() == Threads(torch.get_num_threads(), 1) == Threads(1, 1)
    finally:
        before.use()
