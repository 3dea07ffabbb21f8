"""Packing against plain Python: one integer of all bits, codes at their places."""

from __future__ import annotations

import pytest
import torch

from loftq.core.packing import WIDTHS, pack, packed_size, paired, single, unpack
from loftq.errors import OptionError


def plain_pack(codes: list[int], bits: int) -> bytes:
    stream = sum(code << (i * bits) for i, code in enumerate(codes))
    return stream.to_bytes(-(-len(codes) * bits // 8), "little")


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9, 64, 1000, 4097])
def test_pack_is_the_stream_and_comes_back(bits: int, count: int) -> None:
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(count)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.numpy().tobytes() == plain_pack(codes.tolist(), bits)
    assert len(packed) == packed_size(count, bits)
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_one_a_byte(bits: int) -> None:
    """Oracle: the codes that were paired."""
    codes = torch.randint(2**bits, (128,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    kept = (codes[::2] << 4) | codes[1::2] if bits <= 4 else codes
    assert torch.equal(single(kept, bits), codes)
    assert torch.equal(paired(codes, bits), kept)


def test_other_widths_are_refused() -> None:
    for bits in (0, 9):
        with pytest.raises(OptionError, match=f"{bits} bits"):
            packed_size(8, bits)
