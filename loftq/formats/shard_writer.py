"""Writes the tensors of planned shards in any order.

All bytes are reserved on the disk first, so that a full disk is an error at the start and not after an hour. Then
tensors can be written at their offsets in any order, from any thread, and more than once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Self

import torch

from loftq.errors import CheckpointError
from loftq.formats.checkpoint import Shard, TensorSpec
from loftq.formats.disk import sync

_PIECE = 2**22  # bytes that are read at once


class ShardWriter:
    """Writes tensors into the planned shards of a folder. It is thread-safe, and a context manager.

    The files `kept` are complete: their tensors are not written again. With `join` all files exist already: another
    process has reserved their bytes.
    """

    def __init__(
        self, folder: Path, shards: Iterable[Shard], kept: Collection[str] = (), *, join: bool = False
    ) -> None:
        self._folder, self._join = folder, join
        self._shards = list(shards)
        self._kept = kept
        self._places = {name: (shard, *place) for shard in self._shards for name, place in shard.offsets.items()}
        self._descriptors: dict[str, int] = {}
        self._unsynced: set[str] = set()

    def __enter__(self) -> Self:
        """Create or reopen the files and reserve their bytes."""
        try:
            for shard in (shard for shard in self._shards if shard.file not in self._kept):
                path = self._folder / shard.file
                if self._join:
                    self._descriptors[shard.file] = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                self._descriptors[shard.file] = descriptor
                _reserve(descriptor, shard.nbytes)
                _write_at(descriptor, shard.header, 0)
                self._unsynced.add(shard.file)
            created = () if self._join else self._descriptors
            for folder in {self._folder, *(path.parent for path in map(self._folder.joinpath, created))}:
                sync(folder)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def write(self, name: str, tensor: torch.Tensor) -> str:
        """Write a tensor at its planned offset. Returns the SHA-256 of its bytes.

        Raises CheckpointError if its dtype or shape is not the planned one.
        """
        shard, offset, spec = self._places[name]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise CheckpointError(
                f"tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, expected {spec.dtype} {spec.shape}"
            )
        if not tensor.numel():
            return hashlib.sha256().hexdigest()
        data = _bytes_of(tensor)
        self.write_at(shard.file, data, offset)
        return hashlib.sha256(data).hexdigest()

    def piecewise(self, name: str) -> PiecewiseTensor:
        """Write a tensor at its planned offset in pieces, so that it is never in memory as a whole."""
        shard, offset, spec = self._places[name]
        return PiecewiseTensor(self, shard, offset, spec)

    def write_at(self, file: str, data: memoryview, offset: int) -> None:
        """Write bytes at an offset of a file."""
        if file not in self._kept:
            _write_at(self._descriptors[file], data, offset)
            self._unsynced.add(file)

    def holds(self, name: str, sha256: str) -> bool:
        """Whether the bytes at a tensor's planned offset have this SHA-256, or belong to a file that is complete."""
        if name not in self._places:
            return False
        shard, offset, spec = self._places[name]
        if shard.file in self._kept:
            return True
        digest, end = hashlib.sha256(), offset + spec.nbytes
        while offset < end:
            piece = os.pread(self._descriptors[shard.file], min(_PIECE, end - offset), offset)
            if not piece:
                return False
            digest.update(piece)
            offset += len(piece)
        return digest.hexdigest() == sha256

    def include(self, names: Iterable[str]) -> None:
        """Let the next `sync` wait also for tensors that another process of this machine has written."""
        self._unsynced |= {self._places[name][0].file for name in names} - set(self._kept)

    def sync(self) -> None:
        """Wait until the bytes of all tensors that were written before this call are on the disk."""
        while self._unsynced:
            os.fdatasync(self._descriptors[self._unsynced.pop()])


class PiecewiseTensor:
    """A planned tensor whose bytes are written piece by piece, in order."""

    def __init__(self, writer: ShardWriter, shard: Shard, offset: int, spec: TensorSpec) -> None:
        self._writer, self._shard, self._spec = writer, shard, spec
        self._next, self._end = offset, offset + spec.nbytes
        self._digest = hashlib.sha256()

    def add(self, piece: torch.Tensor) -> None:
        """Write the next piece. Raises CheckpointError if its dtype is not the planned one, or if it does not fit."""
        data = _bytes_of(piece)
        if piece.dtype != self._spec.dtype or self._next + data.nbytes > self._end:
            raise CheckpointError(
                f"a piece {piece.dtype} {tuple(piece.shape)} does not fit the tensor {self._spec.name!r}, which is "
                f"{self._spec.dtype} {self._spec.shape}"
            )
        self._writer.write_at(self._shard.file, data, self._next)
        self._digest.update(data)
        self._next += data.nbytes

    def finish(self) -> str:
        """The SHA-256 of all bytes. Raises CheckpointError if some are missing."""
        if self._next != self._end:
            raise CheckpointError(f"tensor {self._spec.name!r} lacks {self._end - self._next} of its bytes")
        return self._digest.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    data: memoryview = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return data


def _reserve(descriptor: int, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)
    os.ftruncate(descriptor, nbytes)


def _write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
