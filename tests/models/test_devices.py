"""Where work goes when no device is named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from loftq.models.devices import device_to_run, find_gpu, is_here


@pytest.mark.parametrize(
    ("found", "solving", "running"),
    [(None, None, "cpu"), ("mps", None, "mps"), ("cuda", "cuda:1", "cuda"), ("xpu", "xpu:1", "xpu")],
)
def test_solving_needs_float64_and_running_a_model_does_not(
    found: str | None, solving: str | None, running: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = SimpleNamespace(
        is_available=lambda: found is not None,
        current_accelerator=lambda: None if found is None else torch.device(found),
        current_device_index=lambda: 1,
    )
    monkeypatch.setattr(torch, "accelerator", accelerator)
    assert find_gpu() == (None if solving is None else torch.device(solving))
    assert device_to_run(None) == device_to_run(False) == torch.device(running)
    assert device_to_run(True) == torch.device("cpu")
    assert is_here(torch.device("cpu"))
    assert is_here(torch.device("cuda")) == (solving is not None)
