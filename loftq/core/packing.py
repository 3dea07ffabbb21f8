"""Codes of 1 to 8 bits as a dense stream of bytes, low bits first.

Code i of k bits lies at bits i·k … i·k + k − 1 of the stream, where bit b of the stream is bit b mod 8 of byte
b div 8. A 3-bit code may straddle two bytes; eight of them fill three bytes. The last byte is filled with zeros.
"""

from __future__ import annotations

import math

import torch

from loftq.errors import OptionError

WIDTHS = range(1, 9)


def packed_size(count: int, bits: int) -> int:
    """Number of bytes that `count` codes take. Raises OptionError for a width that is not in `WIDTHS`."""
    if bits not in WIDTHS:
        raise OptionError(f"codes of {bits} bits cannot be packed: use {WIDTHS[0]} to {WIDTHS[-1]}")
    return -(-count * bits // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes uint8 (n,), each below 2**bits, into a stream: uint8 (packed_size(n, bits),)."""
    size = packed_size(len(codes), bits)
    group, wide = _group(bits)  # the fewest codes that fill whole bytes, and the number of these bytes
    padded = torch.nn.functional.pad(codes, (0, -len(codes) % group)).view(-1, group)
    words = torch.zeros(len(padded), dtype=_word(wide), device=codes.device)
    for i in range(group):
        words |= padded[:, i].to(words.dtype) << (i * bits)
    return torch.stack([(words >> (8 * i)) & 255 for i in range(wide)], dim=1).to(torch.uint8).view(-1)[:size].clone()


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` codes of a stream: uint8 (count,)."""
    group, wide = _group(bits)
    padded = torch.nn.functional.pad(packed, (0, -len(packed) % wide)).view(-1, wide)
    words = torch.zeros(len(padded), dtype=_word(wide), device=packed.device)
    for i in range(wide):
        words |= padded[:, i].to(words.dtype) << (8 * i)
    mask = (1 << bits) - 1
    return torch.stack([(words >> (i * bits)) & mask for i in range(group)], dim=1).to(torch.uint8).view(-1)[:count]


def _group(bits: int) -> tuple[int, int]:
    common = math.lcm(bits, 8)
    return common // bits, common // 8


def _word(wide: int) -> torch.dtype:
    """The integer dtype that holds a number of bytes without a sign."""
    return torch.int32 if wide < 4 else torch.int64


def paired(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Put codes that take a byte each into the solver's form: codes of at most 4 bits two in a byte, first one high."""
    return codes if bits > 4 else (codes[::2] << 4) | codes[1::2]


def single(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Put codes in the solver's form (`paired`) into a byte each."""
    return codes if bits > 4 else torch.stack([codes >> 4, codes & 15], dim=1).view(-1)
