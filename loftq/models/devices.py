"""The device that work goes to where none is named."""

from __future__ import annotations

import torch


def find_gpu() -> torch.device | None:
    """The GPU that torch finds; None where there is none, and for Apple's, which does not compute in float64."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or found.type == "mps":
        return None
    return torch.device(found.type, torch.accelerator.current_device_index())
