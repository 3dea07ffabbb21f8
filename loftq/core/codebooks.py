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

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from loftq.errors import UnknownNameError

if TYPE_CHECKING:  # tables of names are read for every help text, and torch takes a second
    import torch

ROW = -1  # as a block size: all inputs of an output
ZERO_POINTS = {
    "symmetric": "no zero-point: levels lie around zero",
    "integer": "a whole number of steps",
    "float": "any number, stored in 16 bits",
    "float32": "any number, stored in 32 bits: the result of a merge",
}
_OFFSET = 0.9677083


def normal_float(bits: int) -> torch.Tensor:
    """NormalFloat levels of a width: float32 `(2**bits,)`, ascending, from -1 to 1, zero included."""
    import torch
    from scipy.special import ndtri  # the quantile of the standard normal, without scipy.stats

    half = 2 ** (bits - 1)
    positive = ndtri(torch.linspace(_OFFSET, 0.5, half + 1)[:-1].double().numpy())
    negative = -ndtri(torch.linspace(_OFFSET, 0.5, half)[:-1].double().numpy())
    levels = torch.tensor(sorted([*positive, 0.0, *negative]), dtype=torch.float32)
    return levels / levels.max()


@cache
def dynamic_map() -> torch.Tensor:
    """The signed 8-bit dynamic map: float32 `(256,)`, ascending."""
    import torch

    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2
        for sign in (1, -1):
            values += (sign * 10 ** (exponent - 6) * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def integers(bits: int) -> torch.Tensor:
    """The whole numbers of a width: float32 `(2**bits,)`, from -2**(bits-1) to 2**(bits-1) - 1."""
    import torch

    half = 2 ** (bits - 1)
    return torch.arange(-half, half, dtype=torch.float32)


@dataclass(frozen=True)
class QuantType:
    """A kind of codebook: its title, the widths that it has, and the levels of each.

    Levels of an integer type are `integers`, and groups of them may have zero-points. Those of another are any
    ascending table from -1 to 1, of at most 4 bits. A trellis code (`core.trellis`) has states of `state_bits`, and no
    levels of its own; its width is a mean over the columns of a weight, which can be any hundredth between the first
    and the last of `widths`.
    """

    title: str
    widths: tuple[float, ...]
    levels: Callable[[int], torch.Tensor] | None
    integer: bool = False
    state_bits: int = 0

    @property
    def trellis(self) -> bool:
        """Whether it is a trellis code."""
        return bool(self.state_bits)

    @property
    def sharing(self) -> str:
        """The usual name of the number of weights that share a scale."""
        return "row" if self.trellis else "group size" if self.integer else "block size"

    def has(self, bits: float) -> bool:
        """Whether it has a width."""
        if self.trellis:
            return self.widths[0] <= bits <= self.widths[-1] and round(100 * bits) == 100 * bits
        return bits in self.widths


TYPES = {  # the only place that lists types and widths: a name such as "nf4" is a type's with a width after it
    "nf": QuantType("NormalFloat", (2, 3, 4), normal_float),
    "int": QuantType("integers", (2, 3, 4, 8), integers, integer=True),
    "tcq": QuantType("trellis code", (1.5, 2, 2.5, 3, 3.5, 4), None, state_bits=12),
    "tcqfast": QuantType("trellis code of fewer states", (1.5, 2, 2.5, 3, 3.5, 4), None, state_bits=10),
}


def _names() -> Iterator[tuple[str, tuple[QuantType, float]]]:
    for name, kind in TYPES.items():
        hundredths = range(round(100 * kind.widths[0]), round(100 * kind.widths[-1]) + 1)
        for bits in (n / 100 for n in hundredths) if kind.trellis else kind.widths:
            yield f"{name}{bits:g}", (kind, int(bits) if float(bits).is_integer() else bits)


_SHOWN = 4  # widths of a type that are shown one by one
_TYPE_OF = dict(_names())
CODEBOOKS: dict[str, Any] = {name: bits for name, (_, bits) in _TYPE_OF.items()}  # each with the bits of a code
INTEGERS = {name: int(bits) for name, (kind, bits) in _TYPE_OF.items() if kind.integer}
TABLES = {name: int(bits) for name, (kind, bits) in _TYPE_OF.items() if not kind.integer and not kind.trellis}


def type_of(name: str) -> QuantType:
    """The type that a codebook is a width of."""
    if name not in _TYPE_OF:
        raise UnknownNameError("codebook", name, CODEBOOKS)
    return _TYPE_OF[name][0]


def labels(names: Iterable[str]) -> dict[str, str]:
    """How to call codebooks for a person: many widths of a trellis code by the narrowest and the widest of them."""
    widths: dict[QuantType, list[float]] = {}
    distinct = sorted(set(names))
    for name in distinct:
        widths.setdefault(type_of(name), []).append(CODEBOOKS[name])
    spans = {kind: f"{min(found):g} to {max(found):g}" for kind, found in widths.items() if len(found) > _SHOWN}
    return {
        name: name.removesuffix(f"{CODEBOOKS[name]:g}") + spans.get(type_of(name), f"{CODEBOOKS[name]:g}")
        for name in distinct
    }


def listing(names: Iterable[str]) -> str:
    """Codebooks as they are listed in a note."""
    return ", ".join(sorted(set(labels(names).values())))


@cache
def codebook(name: str) -> torch.Tensor:
    """Levels of a codebook by name, float32 ascending. The tensor is shared: do not write to it."""
    levels = type_of(name).levels
    if levels is None:
        raise UnknownNameError("table of levels", name, TABLES)
    return levels(CODEBOOKS[name])
