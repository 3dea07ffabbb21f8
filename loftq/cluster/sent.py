"""What travels between the driver, the process that started a run, and its workers, beside settings and records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
import torch

from loftq.calibration.progress import mapped
from loftq.calibration.routed_tokens import RoutedTokens
from loftq.calibration.statistics import Statistics
from loftq.formats.checkpoint import Shard
from loftq.formats.shard_writer import ShardWriter
from loftq.planning.plan import Layer

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Array:
    """A tensor that Ray sends without a copy: its bytes as an array, its dtype and its shape."""

    data: Bytes
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Array:
        """The bytes of a tensor."""
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        return cls(flat.numpy(), tensor.dtype, tuple(tensor.shape))

    def tensor(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        return torch.from_numpy(self.data.copy()).view(self.dtype).view(self.shape)


def sendable(output: Any) -> Any:
    """A copy of the output of a block with an `Array` in the place of each tensor."""
    return mapped(output, lambda tensor: Array.of(tensor.to("cpu", copy=True)))


def received(output: Any) -> Any:
    """The output that `sendable` has copied."""
    return mapped(output, Array.tensor, Array)


def arrays_of(routed: RoutedTokens) -> dict[str, Array]:
    """The tensors of routed tokens."""
    return {part.name: Array.of(getattr(routed, part.name)) for part in fields(routed)}


def routed_tokens(arrays: Mapping[str, Array]) -> RoutedTokens:
    """The routed tokens that `arrays_of` has taken apart."""
    return RoutedTokens(**{name: array.tensor() for name, array in arrays.items()})


class BytesWriter(ShardWriter):
    """Keeps the bytes of tensors with their places in the files, for a process that sees the files to write them."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._places = {name: (shard, *place) for shard in shards for name, place in shard.offsets.items()}
        self.pieces: list[tuple[str, int, Bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """There is nothing to close."""

    def write_at(self, file: str, data: memoryview, offset: int) -> None:
        """Keep bytes for an offset of a file."""
        self.pieces.append((file, offset, np.frombuffer(data, np.uint8)))

    def sync(self) -> None:
        """There is nothing on a disk."""


def write_pieces(writer: ShardWriter, pieces: Iterable[tuple[str, int, Bytes]]) -> None:
    """Write the bytes that a `BytesWriter` has kept."""
    for file, offset, data in pieces:
        writer.write_at(file, data.data, offset)


@dataclass(frozen=True)
class SentStatistics(Statistics):
    """The statistics of one layer, which came with its task, for a process that does not see their folder."""

    inputs: Mapping[str, Array] = field(default_factory=dict)

    def moment(self, module: str) -> torch.Tensor | None:  # noqa: ARG002
        """The moment that came with the task."""
        return self.inputs["moment"].tensor() if self.inputs else None

    def routed(self, module: str) -> RoutedTokens | None:  # noqa: ARG002
        """The tokens that came with the task."""
        return routed_tokens(self.inputs) if self.inputs else None


def inputs_of(statistics: Statistics, layer: Layer) -> dict[str, Array]:
    """What `SentStatistics` needs for a layer. It is empty if the text never reached the layer."""
    if layer.experts:
        routed = statistics.routed(layer.owner)
        return {} if routed is None else arrays_of(routed)
    moment = statistics.moment(layer.module)
    return {} if moment is None else {"moment": Array.of(moment)}
