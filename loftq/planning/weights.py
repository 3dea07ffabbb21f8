"""Reads the weights of a source, hashes them, and checks that they are finite."""

from __future__ import annotations

import hashlib

import torch

from loftq.errors import CheckpointError
from loftq.formats.checkpoint import TensorSpec
from loftq.hub.source import Source
from loftq.planning.plan import Layer, Plan


def read_source_weight(plan: Plan, layer: Layer, device: torch.device) -> tuple[torch.Tensor, str]:
    """Read a layer's weight (out, in) in float32, and the SHA-256 of the stored tensor.

    Raises CheckpointError if the weight holds NaN or Inf.
    """
    stored = plan.source.checkpoint.read(layer.tensor)
    weight = (stored.t() if layer.transposed else stored).to(device, torch.float32).contiguous()
    check_finite(weight, layer.tensor, plan.source)
    return weight, digest_of(stored)


def refuse_narrow(spec: TensorSpec) -> None:
    """Raise CheckpointError for a tensor of 8-bit floating point: its values mean nothing without their scales."""
    if spec.dtype.is_floating_point and spec.dtype.itemsize < 2:
        raise CheckpointError(
            f"tensor {spec.name!r} has dtype {spec.dtype}: expected 16 or 32 bits, not quantized: use the model's "
            "16-bit weights"
        )


def digest_of(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def check_finite(tensor: torch.Tensor, name: str, source: Source) -> None:
    """Raise CheckpointError if a tensor of the source holds NaN or Inf."""
    if not is_finite(tensor):
        where = source.checkpoint.folder / source.checkpoint.files[name]
        count = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"tensor {name!r} in {where} holds {count} NaN or Inf: the checkpoint is damaged, download it again"
        )
