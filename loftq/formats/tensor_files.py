"""Reads single tensors of the safetensors files of a folder, whose headers are parsed once.

A safetensors file begins with the length of its header (8 bytes, little-endian). The header is JSON: for each tensor
its dtype, its shape, and the range of its bytes in the rest of the file. The safetensors library checks the header
once, when a file is first opened: ranges lie within the file, fit the shapes, do not overlap and leave no gap. After
that, a tensor costs one read of its own bytes, whatever the number of tensors beside it. The library would parse the
header again for each tensor, so that the time of a run would grow with the square of the number of tensors.

At most `OPEN_FILES` files of a folder are open at a time, and nothing is mapped: a file that is cut short or lies on a
failing disk is an error, not a signal that ends the process. All methods may be called from several threads, and after
a fork: reads name their offset, and a file is closed when the last reader drops it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from loftq.errors import LoftQError

if TYPE_CHECKING:
    import torch

OPEN_FILES = 16
_LENGTH_BYTES = 8
_MOST_BYTES = 1 << 30  # of one read: Linux reads at most 2 GiB at a time


@dataclass(frozen=True)
class TensorPlace:
    """The dtype code and the shape of a tensor, and the range of its bytes in the file."""

    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class _Header:
    """The places of a file's tensors by name, and the state of the file when they were read."""

    state: tuple[int, ...]
    places: Mapping[str, TensorPlace]


class _OpenFile:
    """A descriptor, which is closed when the last reference to it ends."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone when the program ends
        if hasattr(self, "descriptor"):
            close(self.descriptor)


class TensorFiles:
    """The safetensors files of a folder.

    `error` is raised for a file that cannot be read; `remedy` ends its message.
    """

    def __init__(self, folder: Path, error: type[LoftQError], remedy: str) -> None:
        self._folder, self._error, self._remedy = folder, error, remedy
        self._headers: dict[str, _Header] = {}
        self._open: dict[str, _OpenFile] = {}

    def __reduce__(self) -> tuple[type[TensorFiles], tuple[Path, type[LoftQError], str]]:
        return TensorFiles, (self._folder, self._error, self._remedy)  # another process opens the files itself

    def places(self, file: str) -> Mapping[str, TensorPlace]:
        """The places of all tensors of a file. Raises the error of this folder if it is truncated or damaged."""
        return self._header(file).places

    def read(self, file: str, name: str, most: int | None = None, first: int = 0) -> torch.Tensor:
        """The bytes of a tensor, or at most `most` of them from the byte `first`: uint8 (bytes,), a new tensor.

        Raises the error of this folder if the file has no such tensor, cannot be read, or has changed since its header
        was read.
        """
        import torch

        header = self._header(file)
        if name not in header.places:
            raise self._refusal(file, name, "it has none of this name")
        place = header.places[name]
        left = place.end - place.begin - first
        count = left if most is None else min(most, left)
        data = torch.empty(count, dtype=torch.uint8)
        try:
            opened = self._opened(file)
            # Both the open file and the one that now has its name are still what they were.
            for status in (os.fstat(opened.descriptor), (self._folder / file).stat()):
                if _state(status) != header.state:
                    raise self._refusal(file, name, "the file has changed since its header was read")
            _fill(opened.descriptor, data.numpy().data, place.begin + first)
        except OSError as error:
            raise self._refusal(file, name, error.strerror or str(error)) from error
        return data

    def _refusal(self, file: str, name: str, reason: str) -> LoftQError:
        return self._error(f"cannot read tensor {name!r} of {self._folder / file} ({reason}): {self._remedy}")

    def _header(self, file: str) -> _Header:
        header = self._headers.get(file)
        if header is None:
            path = self._folder / file
            try:
                opened = _OpenFile(path)
                header = _read_header(opened.descriptor, path)
            except (SafetensorError, OSError) as error:
                raise self._error(f"{path} is truncated or damaged ({error}): {self._remedy}") from error
            self._keep(file, opened)
            self._headers[file] = header
        return header

    def _opened(self, file: str) -> _OpenFile:
        opened = self._open.get(file)
        if opened is None:
            opened = _OpenFile(self._folder / file)
            self._keep(file, opened)
        return opened

    def _keep(self, file: str, opened: _OpenFile) -> None:
        """Keep a file open, and drop those that were opened first. Single steps, so that threads need no lock."""
        self._open[file] = opened
        for oldest in list(self._open)[:-OPEN_FILES]:
            self._open.pop(oldest, None)


def _read_header(descriptor: int, path: Path) -> _Header:
    before = os.fstat(descriptor)
    # Raises SafetensorError unless the header is valid and fits the size of the file. "np" does not import torch.
    with safe_open(path, "np"):
        after = path.stat()
    if _state(before) != _state(after):
        raise SafetensorError("it is being written")
    length = int.from_bytes(os.pread(descriptor, _LENGTH_BYTES, 0), "little")
    text = bytearray(length)
    _fill(descriptor, memoryview(text), _LENGTH_BYTES)
    entries = json.loads(text)
    entries.pop("__metadata__", None)
    start = _LENGTH_BYTES + length
    places = {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        places[name] = TensorPlace(entry["dtype"], tuple(entry["shape"]), start + begin, start + end)
    return _Header(_state(before), places)


def _fill(descriptor: int, target: memoryview, offset: int) -> None:
    """Read exactly the bytes of `target` at an offset."""
    while target:
        count = os.preadv(descriptor, [target[:_MOST_BYTES]], offset)
        if not count:
            raise OSError("the file ends too early")
        target, offset = target[count:], offset + count


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
