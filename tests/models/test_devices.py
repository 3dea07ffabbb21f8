"""Where work goes when no device is named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from loftq.models.devices import find_gpu


@pytest.mark.parametrize(("found", "expected"), [(None, None), ("mps", None), ("cuda", "cuda:1"), ("xpu", "xpu:1")])
def test_a_gpu_that_computes_in_float64(
    found: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = SimpleNamespace(
        is_available=lambda: found is not None,
        current_accelerator=lambda: None if found is None else torch.device(found),
        current_device_index=lambda: 1,
    )
    monkeypatch.setattr(torch, "accelerator", accelerator)
    assert find_gpu() == (None if expected is None else torch.device(expected))
