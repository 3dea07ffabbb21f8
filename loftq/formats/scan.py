"""Reads a safetensors file once, from its first byte to its last: hashes, and blocks of zeros."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

BLOCK = 512  # bytes. Disks and file systems lose whole blocks, which then read as zeros
_PIECE = 2**22  # bytes that are read at once: whole blocks


@dataclass
class Scan:
    """The contents of a file.

    `tensors` has the SHA-256 of the bytes of each tensor. `zero_blocks` has the number of blocks of each tensor that
    hold only zeros, without the tensors that have none.
    """

    nbytes: int = 0
    sha256: str = ""
    header: bytes = b""
    tensors: dict[str, str] = field(default_factory=dict)
    zero_blocks: dict[str, int] = field(default_factory=dict)


def scan(path: Path, places: Mapping[str, tuple[int, int]] | None = None) -> Scan:
    """Read a file once. `places` are the first byte and the end of each tensor; by default those of its header."""
    if places is None:
        places = _places_of(path) if path.suffix == ".safetensors" else {}
    result, digest, at = Scan(), hashlib.sha256(), 0
    with path.open("rb") as file:
        for name, (start, end) in sorted(places.items(), key=lambda item: item[1]):
            if start < at or end < start:  # the tensors of a damaged header overlap
                continue
            gap = file.read(start - at)
            digest.update(gap)
            result.header = result.header or gap
            result.tensors[name], zeros = _scan_tensor(file, end - start, digest)
            if zeros:
                result.zero_blocks[name] = zeros
            at = end
        rest = file.read(_PIECE)
        result.header = result.header or rest
        while rest:
            digest.update(rest)
            rest = file.read(_PIECE)
        result.nbytes, result.sha256 = file.tell(), digest.hexdigest()
    return result


def _scan_tensor(file: BinaryIO, nbytes: int, digest: Any) -> tuple[str, int]:
    """The SHA-256 of the next bytes of a file, and the number of their blocks that hold only zeros."""
    own, zeros = hashlib.sha256(), 0
    while nbytes > 0:
        piece = file.read(min(_PIECE, nbytes))
        if not piece:  # the file is truncated
            break
        own.update(piece)
        digest.update(piece)
        nbytes -= len(piece)
        whole = len(piece) // BLOCK * BLOCK
        if whole:
            blocks = np.frombuffer(piece, np.uint64, whole // 8).reshape(-1, BLOCK // 8)
            zeros += int((~blocks.any(1)).sum())
        zeros += whole < len(piece) and not any(piece[whole:])
    return own.hexdigest(), zeros


def _places_of(path: Path) -> dict[str, tuple[int, int]]:
    """The first byte and the end of each tensor, from the header; empty if the file has no such header."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            return {}
        text = file.read(size)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        places = {name: entry["data_offsets"] for name, entry in header.items()}
        return {name: (8 + size + int(start), 8 + size + int(end)) for name, (start, end) in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def hash_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
