"""The parts of a report's page: what each shows, and its plots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from loftq.reporting import charts, drawing
from loftq.reporting.measured import OUTPUTS, WEIGHTS, Measured

_WHOLE, _HALF = 12.4, 6.2  # inches


class Section(NamedTuple):
    """Its plots are SVG, in pairs where there is room; `colors` says whether they are the artifacts'."""

    title: str
    text: str
    plots: Sequence[str]
    pair: bool = False
    colors: bool = True


def sections(found: Sequence[Measured]) -> Iterator[Section]:
    """The parts for which these artifacts have something to show."""
    prefixes = [prefix for prefix in (WEIGHTS, OUTPUTS) if any(one.has(prefix) for one in found)]
    kinds = len({kind for one in found for kind in one.kinds})
    yield _errors(found, prefixes)
    yield _by_kind(found, prefixes, kinds)
    for prefix in prefixes:
        yield Section(
            f"By block: {charts.NAMES[prefix]}",
            "Blocks from the first to the last, a panel for each kind of module; dotted what plain rounding leaves.",
            [drawing.svg(charts.depths, _WHOLE, 0.6 + 2.1 * -(-kinds // 4), found=found, prefix=prefix)],
        )
    traced = [prefix for prefix in prefixes if any(one.has(prefix) and one.trace(prefix).shape[1] > 1 for one in found)]
    if traced:
        yield Section(
            "Iterations",
            "What alternating leaves of plain rounding's error: lines are the median layer, bands the middle half of "
            "layers. The best iterate is kept.",
            [drawing.panel(charts.trace, _HALF, 3.3, found=found, prefix=prefix) for prefix in traced],
            pair=True,
        )
    yield _singular_values(found)
    varying = list(_varying(found))
    if varying:
        yield Section("Bits and rank by layer", "Where they are not the same everywhere.", varying, colors=False)


def _errors(found: Sequence[Measured], prefixes: Sequence[str]) -> Section:
    height = 0.9 + 0.36 * len(found)
    return Section(
        "Error",
        "Pale what plain rounding leaves, in full color what is left with the adapter. A start that was calibrated on "
        "text makes the error of outputs small, whatever becomes of that of weights.",
        [drawing.panel(charts.bars_of_totals, _HALF, height, found=found, prefix=prefix) for prefix in prefixes],
        pair=True,
    )


def _by_kind(found: Sequence[Measured], prefixes: Sequence[str], kinds: int) -> Section:
    height = 0.9 + (0.16 + 0.13 * len(found)) * kinds
    return Section(
        "By kind of module",
        "All layers of a kind together: a ring is what plain rounding leaves, a dot what is left with the adapter.",
        [drawing.panel(charts.by_kind, _HALF, height, found=found, prefix=prefix) for prefix in prefixes],
        pair=True,
    )


def _singular_values(found: Sequence[Measured]) -> Section:
    return Section(
        "Singular values",
        "How much of ‖s·B·A‖² + ‖W − Q − s·B·A‖² the adapter's largest singular values hold, and all of them by kind.",
        [drawing.panel(draw, _HALF, 3.6, found=found) for draw in (charts.captured, charts.captured_by_kind)],
        pair=True,
    )


def _varying(found: Sequence[Measured]) -> Iterator[str]:
    for i, one in enumerate(found):
        for what, values in (("type", one.grid_of("codebook")), ("rank", one.ranks)):
            if values:
                height, title = 0.8 + 0.27 * len({place.kind for place in values}), f"{one.label}: {what}"
                yield drawing.panel(charts.squares, _WHOLE, height, values=values, artifact=i, title=title)
