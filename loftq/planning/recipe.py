"""The recipe of a run: the settings of the user, and a value for each setting that they leave open."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Unpack, cast

import torch

from loftq.core.codebooks import TYPES
from loftq.core.grid import ROW, Grid
from loftq.core.solvers.methods import METHODS, WITH_TEXT, WITHOUT_TEXT, Method
from loftq.errors import OptionError
from loftq.formats import layouts
from loftq.formats.adapter import scaling
from loftq.planning.grid_settings import with_grid
from loftq.planning.keywords import QuantizeKeywords
from loftq.planning.method_names import honest_name, with_honest_name
from loftq.planning.roundings import check_trellis, rounding_of
from loftq.planning.settings import (
    CALIBRATION_TOKENS,
    EXPERT_RANK,
    FIRST_WIDTHS,
    SENSITIVE,
    SEQUENCE_LENGTH,
    QuantizeSettings,
)
from loftq.settings import declared, from_dict

_OF_EXPERTS = ("expert_bits", "expert_rank")
_IF_USED = (*_OF_EXPERTS, "backbone")  # settings that `loftq.json` leaves out if they are None


def layer_seed(seed: int, module: str) -> int:
    """The seed of a single layer. It does not depend on the order in which layers are solved."""
    digest = hashlib.sha256(f"{seed} {module}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True, kw_only=True)
class Recipe(QuantizeSettings):
    """Settings of which none is left open. None means that the run does not use a setting, as a LoRA does not use
    `pool_size`.

    `requested` are the settings of the user, from which the recipe was decided. The command that makes the artifact
    again is written from them.
    """

    quant_type: str
    method: str
    scales: str
    rounding: str
    iters: int
    refine: int
    alpha: float
    requested: QuantizeSettings = dataclasses.field(repr=False, compare=False)

    @property
    def solving(self) -> Method:
        """The method, with the scales and the rounding of this recipe."""
        return replace(METHODS[self.method], scales=self.scales, rounding=self.rounding)

    @property
    def needs_adapter(self) -> bool:
        """Whether the backbone leaves out what the adapter adds, so that it is of no use alone."""
        return self.solving.projects

    @property
    def widths(self) -> tuple[float, ...]:
        """The widths in bits that layers may get, the narrowest first."""
        if self.allocation is None or (self.allocation == SENSITIVE and TYPES[self.quant_type].trellis):
            return (self.bits,)  # of trellis codes, whose layers get any hundredth of a bit, it stands for all
        return FIRST_WIDTHS if self.allocation == "first" else TYPES[self.quant_type].widths

    @property
    def measures_widths(self) -> bool:
        """Whether the widths of layers are chosen by what a run measures."""
        return self.allocation in ("auto", SENSITIVE)

    @property
    def scaling(self) -> float:
        """The factor of B·A in the adapter: alpha/rank, or alpha/sqrt(rank) with `rslora`."""
        return scaling(self.alpha, self.rank, self.rslora)

    @property
    def expert_alpha(self) -> float:
        """The alpha of fused experts, which gives their adapter the same scaling."""
        rank = cast(int, self.expert_rank)
        return self.scaling * (rank**0.5 if self.rslora else rank)

    def without_experts(self) -> Recipe:
        """The recipe of a model none of whose experts are quantized. The settings of experts are not used."""
        return replace(self, expert_bits=None, expert_rank=None)

    def grid(self, width: float) -> Grid:
        """The type of a weight that has a width of `width` bits."""
        shared = self.group_size if self.block_size is None else self.block_size
        return Grid(f"{self.quant_type}{width:g}", cast(int, shared), self.double_quant, self.zero_point)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The types that layers may get, the narrowest first."""
        return tuple(self.grid(width) for width in self.widths)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model computes, and in which tensors that are not quantized are stored."""
        dtype: torch.dtype = getattr(torch, self.compute_dtype)
        return dtype

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as in `loftq.json`, without settings of experts and of a backbone that there is not."""
        values = {name: getattr(self, name) for name in declared(QuantizeSettings)}
        return {name: value for name, value in values.items() if value is not None or name not in _IF_USED}


def recipe_of(**settings: Unpack[QuantizeKeywords]) -> Recipe:
    """Make the recipe of settings that are given by name. Raises OptionError."""
    return resolve(from_dict(QuantizeSettings, settings))


def recipe_again(values: Mapping[str, Any]) -> Recipe:
    """Make the recipe that a `loftq.json` holds. Settings that this version does not have are ignored."""
    known = with_honest_name(values)
    return resolve(
        from_dict(QuantizeSettings, {name: known[name] for name in declared(QuantizeSettings) if name in known})
    )


def resolve(requested: QuantizeSettings) -> Recipe:
    """Choose a value for each setting that is left open. Raises OptionError for settings that contradict each other."""
    settings = requested
    steps: tuple[Callable[[QuantizeSettings], QuantizeSettings], ...] = (
        _with_bits,
        with_grid,
        _with_pool,
        _with_experts,
        _with_method,
        _with_text,
    )
    for step in steps:
        settings = step(settings)
    alpha = float(settings.rank if settings.alpha is None else settings.alpha)
    values = {name: getattr(settings, name) for name in declared(QuantizeSettings)}
    recipe = Recipe(**{**values, "alpha": alpha}, requested=requested)
    layouts.choose(recipe.grids, recipe.format)
    return recipe


def _with_bits(settings: QuantizeSettings) -> QuantizeSettings:
    """Set the bits (an int if they are whole), their type, and the allocation of a budget that is not a width."""
    bits = int(settings.bits) if float(settings.bits).is_integer() else settings.bits
    quant_type = settings.quant_type or _usual_type(bits, settings.adapter)
    kind = TYPES[quant_type]
    widths = FIRST_WIDTHS if settings.allocation == "first" else kind.widths
    if settings.allocation is None and kind.trellis and kind.has(bits):
        return replace(settings, bits=bits, quant_type=quant_type)
    if not min(widths) <= bits <= max(widths):
        listed = ", ".join(map(str, widths))
        raise OptionError(
            f"--bits {bits}: {quant_type} does not have this width: choose {listed}, or a budget between them"
        )
    allocation = "auto" if bits not in widths and settings.allocation is None else settings.allocation
    return replace(settings, bits=bits, quant_type=quant_type, allocation=allocation)


def _usual_type(bits: float, adapter: str) -> str:
    """The first type that is wide enough. QA-LoRA needs integers, because only they have zero-points."""
    usable = [name for name, kind in TYPES.items() if kind.integer or (adapter != "qalora" and not kind.trellis)]
    return next((name for name in usable if bits <= max(TYPES[name].widths)), usable[-1])


def _with_pool(settings: QuantizeSettings) -> QuantizeSettings:
    """Set the number of inputs that QA-LoRA pools: by default those of a group."""
    if settings.adapter != "qalora":
        if settings.pool_size is not None:
            raise OptionError(f"--pool-size {settings.pool_size}: applies only to --adapter qalora: leave it out")
        return settings
    if not TYPES[cast(str, settings.quant_type)].integer:
        raise OptionError(
            f"--quant-type {settings.quant_type}: QA-LoRA merges into zero-points, which only int has: leave it out"
        )
    group = cast(int, settings.group_size)
    if group == ROW:
        raise OptionError(f"--group-size {ROW}: QA-LoRA pools the inputs of a group: use 32, 64 or 128")
    pool = group if settings.pool_size is None else settings.pool_size
    if pool < group or pool % group:
        raise OptionError(f"--pool-size {pool}: expected a multiple of the group size, {group}")
    return replace(settings, pool_size=pool)


def _with_experts(settings: QuantizeSettings) -> QuantizeSettings:
    """Set the bits and the rank of fused experts; None if the format or the adapter has no place for them."""
    other = option_without_experts(settings)
    given = [name for name in _OF_EXPERTS if getattr(settings, name) is not None]
    if other is not None:
        if given:
            raise OptionError(
                f"{declared(QuantizeSettings)[given[0]].option}: {other} leaves fused experts in 16 bits: leave one "
                "of the two out"
            )
        return settings
    kind = TYPES[cast(str, settings.quant_type)]
    below = [width for width in kind.widths if width <= settings.bits]
    usual = settings.bits if kind.has(settings.bits) else max(below, default=min(kind.widths))
    bits = usual if settings.expert_bits is None else settings.expert_bits
    if not kind.has(bits):
        listed = ", ".join(map(str, kind.widths))
        raise OptionError(f"--expert-bits {bits:g}: {settings.quant_type} does not have this width: choose {listed}")
    bits = int(bits) if float(bits).is_integer() else bits
    return replace(settings, expert_bits=bits, expert_rank=settings.expert_rank or EXPERT_RANK)


def option_without_experts(settings: QuantizeSettings) -> str | None:
    """The option that leaves fused experts in 16 bits, because it has no place for them; None if there is none."""
    if settings.adapter != "lora":
        return f"--adapter {settings.adapter}"
    if settings.format is not None and not layouts.LAYOUTS[settings.format].EXPERTS:
        return f"--format {settings.format}"
    return None


def _with_method(settings: QuantizeSettings) -> QuantizeSettings:
    """Set the method, and take from it the scales, rounding, iterations and refinement that are left open."""
    name = settings.method or (WITHOUT_TEXT if settings.calibration is None else WITH_TEXT)
    name = honest_name(name, settings.iters)
    preset = METHODS[name]
    turns = preset.iterations
    if TYPES[cast(str, settings.quant_type)].trellis:
        check_trellis(settings, name, preset)
        turns = 1 if preset.needs_moment else turns  # another turn was never better
    iters = turns if settings.iters is None else settings.iters
    settings = replace(
        settings,
        method=name,
        scales=settings.scales or preset.scales,
        rounding=rounding_of(settings, preset, iters),
        iters=iters,
        refine=preset.refine if settings.refine is None else settings.refine,
    )
    plain = replace(preset, scales=cast(str, settings.scales), rounding=cast(str, settings.rounding)).plain
    if settings.adapter == "qalora":
        _check_qalora(settings, preset)
    elif settings.svd == "exact" and (settings.calibration is not None or not plain):
        raise OptionError("--svd exact: applies only to LoftQ without text: leave it out")
    return settings


def _check_qalora(settings: QuantizeSettings, preset: Method) -> None:
    """Raise OptionError for settings that QA-LoRA's solver, which fits scales and pooled factors together, lacks."""
    methods = [name for name, method in METHODS.items() if method.metric == "identity" or not method.plain]
    if settings.method not in methods:
        raise OptionError(f"--method {settings.method}: QA-LoRA only has {', '.join(methods)}")
    for option in ("scales", "rounding"):
        value = getattr(settings, option)
        if not preset.needs_moment and value != getattr(preset, option):
            raise OptionError(
                f"--{option} {value}: without text, QA-LoRA fits the scales to the nearest codes: leave it out"
            )
    if settings.svd == "exact":
        raise OptionError("--svd exact: QA-LoRA's factors are always exact: leave it out")


def _with_text(settings: QuantizeSettings) -> QuantizeSettings:
    """Set how much text is used. Without text, raise OptionError for settings that need it."""
    if settings.calibration is not None:
        return replace(
            settings,
            calibration_tokens=settings.calibration_tokens or CALIBRATION_TOKENS,
            sequence_length=settings.sequence_length or SEQUENCE_LENGTH,
        )
    preset = METHODS[cast(str, settings.method)]
    text_settings = {
        "--calibration-tokens": settings.calibration_tokens,
        "--sequence-length": settings.sequence_length,
        "--refine": settings.refine or None,
        "--method": settings.method if preset.needs_moment else None,
        "--allocation": settings.allocation if settings.allocation == SENSITIVE else None,
        "--rounding": settings.rounding if settings.rounding != preset.rounding else None,
    }
    for option, value in text_settings.items():
        if value is not None:
            raise OptionError(f"{option} {value}: needs text: add --calibration FILE, or --calibration default")
    return settings
