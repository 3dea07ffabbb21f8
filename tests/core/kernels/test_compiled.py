"""Compiled loops where the surroundings are unusual: nowhere to keep what was compiled, a forked process."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from numba.core.caching import CacheImpl

from loftq.core.kernels import blocks
from loftq.core.kernels.compiled import compiled


def _double(x, out):  # type: ignore[no-untyped-def]
    for i in range(len(x)):
        out[i] = 2 * x[i]


def test_without_a_place_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container of another user. Oracle: numpy."""
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    x = torch.arange(5.0).numpy()
    out = x * 0
    compiled(_double)(x, out)
    assert (out == 2 * x).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    """Oracle: the parent's sum, by which its threads have begun."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = torch.ones(1 << 18)
        assert blocks.squared_norm(x, 64) == len(x)
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(0 if blocks.squared_norm(x, 64) == len(x) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(threads)
