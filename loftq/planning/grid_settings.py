"""Chooses the settings of a type that are left open: how many weights share a scale, and the zero-point."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from loftq.core.codebooks import TYPES
from loftq.core.grid import ROW, Grid
from loftq.errors import OptionError
from loftq.formats import layouts
from loftq.planning.settings import BLOCK_SIZE, QuantizeSettings


def with_grid(settings: QuantizeSettings) -> QuantizeSettings:
    """Set the number of weights that share a scale (a whole row if the format has no groups), and the zero-point."""
    kind, name = TYPES[cast(str, settings.quant_type)], settings.quant_type
    if kind.trellis:
        return _with_rows(settings)
    if not kind.integer:
        for option, value in (("--group-size", settings.group_size), ("--zero-point", settings.zero_point)):
            if value is not None:
                raise OptionError(
                    f"{option} {value}: applies only to integers: add --quant-type int ({name} has --block-size)"
                )
        return replace(settings, block_size=BLOCK_SIZE if settings.block_size is None else settings.block_size)
    if settings.block_size is not None:
        tables = ", ".join(name for name, kind in TYPES.items() if not kind.integer)
        raise OptionError(
            f"--block-size {settings.block_size}: applies only to {tables}: use --group-size for integers"
        )
    rows = (
        settings.group_size in (None, ROW) and settings.zero_point in (None, "symmetric") and _has_only_rows(settings)
    )
    floating = settings.adapter == "qalora" and _holds(
        settings.format, Grid(f"{name}{kind.widths[-1]}", zero_point="float")
    )
    usual = "symmetric" if rows else "float" if floating else "integer"
    return replace(
        settings,
        group_size=(ROW if rows else BLOCK_SIZE) if settings.group_size is None else settings.group_size,
        zero_point=settings.zero_point or usual,
    )


def _with_rows(settings: QuantizeSettings) -> QuantizeSettings:
    """Set the scales of a trellis code, which belong to whole rows and columns."""
    given = {
        "--block-size": None if settings.block_size == ROW else settings.block_size,
        "--group-size": settings.group_size,
        "--zero-point": settings.zero_point,
        "--double-quant": settings.double_quant or None,
    }
    for option, value in given.items():
        if value is not None:
            raise OptionError(f"{option} {value}: does not apply to --quant-type {settings.quant_type}: leave it out")
    return replace(settings, block_size=ROW)


def _has_only_rows(settings: QuantizeSettings) -> bool:
    """Whether the format, or else the first format that holds the type, has scales for rows but not for groups."""
    if settings.allocation is not None or settings.double_quant or settings.adapter == "qalora":
        return False
    rows = Grid(f"{settings.quant_type}{settings.bits:g}", ROW, zero_point="symmetric")
    names = [settings.format] if settings.format is not None else list(layouts.LAYOUTS)
    first = next((name for name in names if _holds(name, rows)), None)
    return first is not None and not _holds(first, replace(rows, block_size=BLOCK_SIZE))


def _holds(format: str | None, grid: Grid) -> bool:
    """Whether a format, or any format if it is None, can hold a type with its block size."""
    names = [format] if format is not None else list(layouts.LAYOUTS)
    candidates = (layouts.LAYOUTS[name] for name in names)
    return any(layout.holds(grid) and grid.block_size in layout.BLOCK_SIZES for layout in candidates)
