"""One pass over a safetensors file. Oracles: hashlib on the same bytes, and blocks of zeros that are put there."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loftq.formats.scan import BLOCK, hash_of, scan


def test_hashes_and_zeros_of_each_tensor(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(1, 2001, dtype=torch.float32), "b": torch.ones(3), "c": torch.zeros(130)}
    tensors["a"][128 : 3 * 128] = 0  # the second and third block of 512 bytes
    save_file(tensors, tmp_path / "x.safetensors")
    found = scan(tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    assert (found.nbytes, found.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert found.sha256 == hash_of(tmp_path / "x.safetensors")
    assert content.startswith(found.header)
    assert found.tensors == {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in tensors.items()}
    assert found.zero_blocks == {"a": 2, "c": 2}  # of c the last one is short
    assert BLOCK == 512


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{]" + bytes(9)]
)
def test_a_file_without_a_header_is_only_hashed(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    found = scan(tmp_path / "x.safetensors")
    assert (found.sha256, found.tensors) == (hashlib.sha256(content).hexdigest(), {})
