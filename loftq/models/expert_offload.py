"""Packed experts that are held in main memory while everything else is on an accelerator (`--offload experts`).

`expert_moves` copies them to the accelerator, one group at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from loftq.errors import OptionError
from loftq.models.choices import OFFLOADS
from loftq.models.devices import find_gpu
from loftq.models.packed_experts import PackedExperts

(EXPERTS,) = OFFLOADS
MAIN_MEMORY = torch.device("cpu")


def one_device(device_map: Any) -> torch.device:
    """The single device of a device map; without one, the GPU if there is one. Raises OptionError for several."""
    named = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
    if named == [None]:
        return find_gpu() or MAIN_MEMORY
    if len(named) != 1 or named[0] in ("auto", "balanced", "balanced_low_0", "sequential", "disk"):
        raise OptionError(f'offload="{EXPERTS}": expected one device as device_map, not {device_map}')
    return torch.device(named[0])


def offload_experts(model: Any, device: torch.device) -> None:
    """Move a model that lies in main memory to a device, all but its packed experts, which are pinned for copies.

    They stay in main memory wherever the model is moved later.
    """
    for module in model.modules():
        if isinstance(module, PackedExperts):
            module.offloaded = True
            for tensor in module.packed_tensors().values():
                if device.type != MAIN_MEMORY.type:
                    tensor.data = tensor.data.pin_memory()
    nn.Module.to(model, device)
    if hasattr(model, "hf_device_map"):
        model.hf_device_map = {"": device}


def refusal(name: str) -> str:
    """Why the experts of a model cannot be held in main memory."""
    return f"--offload {EXPERTS}: {name} has no quantized experts: leave the option out"
