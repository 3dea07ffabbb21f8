"""Chooses the rounding of a run, where it is left open, and checks what the solver of trellis codes lacks.

`projected` rounding leaves to the adapter what the weight has along the directions that the adapter corrects
(`core.directions`). It gives a better start, and a backbone that is of no use alone. So it is the default only for
types whose backbone is of little use alone anyway, and which are loaded by loftq, which says so.
"""

from __future__ import annotations

from typing import cast

from loftq.core.codebooks import TYPES
from loftq.core.solvers.methods import METHODS, Method
from loftq.errors import OptionError
from loftq.planning.settings import QuantizeSettings

_PROJECTED = "projected"
_BELOW = 3  # bits: from here on a backbone is of use alone, and projecting gained little (docs/benchmarks.md)


def rounding_of(settings: QuantizeSettings, preset: Method, iters: int) -> str:
    """The rounding of the settings, or by default that of the method. Raises OptionError."""
    if settings.rounding == _PROJECTED:
        _check_projected(settings, iters)
    if settings.rounding is not None:
        return settings.rounding
    kind = TYPES[cast(str, settings.quant_type)]
    narrow = kind.trellis or (not kind.integer and settings.bits < _BELOW)
    return _PROJECTED if preset.rounding == "intrinsic" and narrow and iters else preset.rounding


def _check_projected(settings: QuantizeSettings, iters: int) -> None:
    """Raise OptionError if the adapter cannot hold what projected rounding leaves to it."""
    if settings.adapter != "lora":
        raise OptionError(f"--rounding {_PROJECTED}: --adapter {settings.adapter} cannot hold what it leaves out")
    if not iters:
        raise OptionError(
            f"--rounding {_PROJECTED}: with --iter 0 the adapter adds nothing, so the backbone must have all of the "
            "weight: use --rounding intrinsic"
        )


def check_trellis(settings: QuantizeSettings, name: str, preset: Method) -> None:
    """Raise OptionError for settings that the solver of trellis codes lacks. `name` is that of the method."""
    methods = [method for method, row in METHODS.items() if row.metric == "identity" or row.rounding == "intrinsic"]
    if name not in methods:
        raise OptionError(f"--method {name}: --quant-type {settings.quant_type} only has {', '.join(methods)}")
    known = {
        "scales": (None, preset.scales),
        "rounding": (None, preset.rounding, *([_PROJECTED] if preset.rounding == "intrinsic" else [])),
    }
    for option, values in known.items():
        value = getattr(settings, option)
        if value not in values:
            raise OptionError(f"--{option} {value}: does not apply to --quant-type {settings.quant_type}: leave it out")
    if settings.svd == "exact":
        raise OptionError(f"--svd exact: does not apply to --quant-type {settings.quant_type}: leave it out")
