"""Reads the weights of a source, hashes them, and checks that they are finite."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from loftq.errors import CheckpointError
from loftq.formats.artifact import combine_hashes
from loftq.formats.checkpoint import TensorSpec
from loftq.hub.source import Source
from loftq.models.naming import fuse
from loftq.planning.plan import Layer, Plan


def read_source_weight(plan: Plan, layer: Layer, device: torch.device) -> tuple[torch.Tensor, str]:
    """Read a layer's weight (out, in) in float32, and the SHA-256 of the stored tensor.

    Raises CheckpointError if the weight holds NaN or Inf.
    """
    stored = plan.source.checkpoint.read(layer.tensor)
    weight = (stored.t() if layer.transposed else stored).to(device, torch.float32).contiguous()
    check_finite(weight, layer.tensor, plan.source)
    return weight, digest_of(stored)


class ExpertReader:
    """Reads the weights of fused experts one by one, in order, and hashes them."""

    def __init__(self, plan: Plan, layer: Layer) -> None:
        self._plan, self._layer = plan, layer
        self._whole = hashlib.sha256()
        self._parts: dict[str, str] = {}

    def __iter__(self) -> Iterator[torch.Tensor]:
        """The weight (out, in) of each expert in float32. Raises CheckpointError if one holds NaN or Inf."""
        for expert in range(self._layer.experts):
            stored = self._fused(expert) if self._layer.parts else self._member(expert)
            yield (stored.t() if self._layer.transposed else stored).float().contiguous()

    @property
    def digest(self) -> str:
        """The SHA-256 of the tensor of all experts, or the one that combines those of their parts. Known at the end."""
        return combine_hashes(self._parts) if self._parts else self._whole.hexdigest()

    @property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of each tensor that was read. Known at the end."""
        return self._parts or {self._layer.tensor: self._whole.hexdigest()}

    def _member(self, expert: int) -> torch.Tensor:
        stored = self._plan.source.checkpoint.read_member(self._layer.tensor, expert)
        check_finite(stored, self._layer.tensor, self._plan.source)
        self._whole.update(_bytes_of(stored))
        return stored

    def _fused(self, expert: int) -> torch.Tensor:
        parts = []
        for name, pattern in self._layer.parts[expert]:
            stored = self._plan.source.checkpoint.read(name)
            check_finite(stored, name, self._plan.source)
            self._parts[name] = digest_of(stored)
            parts.append((name, pattern, stored))
        (fused,) = fuse(self._plan.model, self._layer.module, parts).values()
        return fused[0]


def source_digest(plan: Plan, layer: Layer) -> str:
    """The hash of a layer's weights, as the step that solves it records it."""
    if not layer.experts:
        return digest_of(plan.source.checkpoint.read(layer.tensor))
    reader = ExpertReader(plan, layer)
    for _ in reader:
        pass
    return reader.digest


def check_quantizable(spec: TensorSpec) -> None:
    """Raise CheckpointError for a tensor that is not of 16 or more bits."""
    if spec.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise CheckpointError(f"tensor {spec.name!r} has dtype {spec.dtype}: expected 16 or 32 bits, not quantized")


def refuse_narrow(spec: TensorSpec) -> None:
    """Raise CheckpointError for a tensor of 8-bit floating point: its values mean nothing without their scales."""
    if spec.dtype.is_floating_point and spec.dtype.itemsize < 2:
        raise CheckpointError(
            f"tensor {spec.name!r} has dtype {spec.dtype}: expected 16 or 32 bits, not quantized: use the model's "
            "16-bit weights"
        )


def digest_of(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(_bytes_of(tensor)).hexdigest()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    data: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return data


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
