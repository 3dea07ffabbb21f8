"""Codebooks: the values that a quantized weight can take, before its block's scale.

NormalFloat (QLoRA, arXiv 2305.14314, section 3) places its levels at quantiles of the standard normal
distribution, with an exact zero and one level more on the positive side:

    positive:  ppf(linspace(offset, 1/2, 2^(k-1) + 1)) without its end      2^(k-1)     levels
    negative: -ppf(linspace(offset, 1/2, 2^(k-1)))     without its end      2^(k-1) - 1 levels
    all divided by the largest, offset = 0.9677083

The evenly spaced points are float32, as in bitsandbytes, whose NF4 table this reproduces to the last bit.
LoftQ (arXiv 2310.08659, section 3.1) uses the same construction at 2 and 3 bits.

Integers are whole numbers of a width, centered on zero: a group's scale is the step between them.

The dynamic map (arXiv 2110.02861, section 1.3) is the 8-bit codebook in which double quantization stores
block scales: a sign, a decimal exponent in unary, and a linear fraction with the bits that are left.
"""

from __future__ import annotations

from functools import cache

import torch
from scipy.special import ndtri  # the quantile of the standard normal: scipy.stats.norm.ppf, without its import

from loftq.errors import UnknownNameError

_OFFSET = 0.9677083


def normal_float(bits: int) -> torch.Tensor:
    """NormalFloat levels of a width: float32 `(2**bits,)`, ascending, from -1 to 1, zero included."""
    half = 2 ** (bits - 1)
    positive = ndtri(torch.linspace(_OFFSET, 0.5, half + 1)[:-1].double().numpy())
    negative = -ndtri(torch.linspace(_OFFSET, 0.5, half)[:-1].double().numpy())
    levels = torch.tensor(sorted([*positive, 0.0, *negative]), dtype=torch.float32)
    return levels / levels.max()


@cache
def dynamic_map() -> torch.Tensor:
    """The signed 8-bit dynamic map: float32 `(256,)`, ascending."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2
        for sign in (1, -1):
            values += (sign * 10 ** (exponent - 6) * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def integers(bits: int) -> torch.Tensor:
    """The whole numbers of a width: float32 `(2**bits,)`, from -2**(bits-1) to 2**(bits-1) - 1."""
    half = 2 ** (bits - 1)
    return torch.arange(-half, half, dtype=torch.float32)


NORMAL_FLOATS = {f"nf{bits}": bits for bits in (2, 3, 4)}
INTEGERS = {f"int{bits}": bits for bits in (2, 3, 4, 8)}
CODEBOOKS = {**NORMAL_FLOATS, **INTEGERS}  # name to bits a code


@cache
def codebook(name: str) -> torch.Tensor:
    """Levels of a codebook by name, float32 ascending. The tensor is shared: do not write to it."""
    if name not in CODEBOOKS:
        raise UnknownNameError("codebook", name, CODEBOOKS)
    make = normal_float if name in NORMAL_FLOATS else integers
    return make(CODEBOOKS[name])
