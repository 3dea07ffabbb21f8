"""The sections of the page of a report: their texts and their plots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from loftq.reporting import charts, drawing
from loftq.reporting.measured import OUTPUTS, WEIGHTS, Measured

_WHOLE, _HALF = 12.4, 6.2  # inches


class Section(NamedTuple):
    """A section of the page.

    Its plots are SVG, shown in pairs if `pair` is true and there is room. `colors` is true if the plots use the colors
    of the artifacts, so that a legend is needed.
    """

    title: str
    text: str
    plots: Sequence[str]
    pair: bool = False
    colors: bool = True


def sections(artifacts: Sequence[Measured]) -> Iterator[Section]:
    """The sections for which these artifacts have values to show."""
    prefixes = [prefix for prefix in (WEIGHTS, OUTPUTS) if any(measured.has(prefix) for measured in artifacts)]
    kinds = len({kind for measured in artifacts for kind in measured.kinds})
    yield _errors(artifacts, prefixes)
    yield _by_kind(artifacts, prefixes, kinds)
    for prefix in prefixes:
        yield Section(
            f"By block: {charts.NAMES[prefix]}",
            "The error of each block, with a panel for each kind of module. Dotted lines are plain rounding, full "
            "lines are with the adapter.",
            [drawing.svg(charts.depths, _WHOLE, 0.6 + 2.1 * -(-kinds // 4), artifacts=artifacts, prefix=prefix)],
        )
    traced = [
        prefix
        for prefix in prefixes
        if any(measured.has(prefix) and measured.trace(prefix).shape[1] > 1 for measured in artifacts)
    ]
    if traced:
        yield Section(
            "Iterations",
            "The error after each iteration, relative to plain rounding. Lines are the median layer, bands the middle "
            "half of layers. The best iterate is kept.",
            [drawing.panel(charts.trace, _HALF, 3.3, artifacts=artifacts, prefix=prefix) for prefix in traced],
            pair=True,
        )
    yield _singular_values(artifacts)
    varying = list(_varying(artifacts))
    if varying:
        yield Section(
            "Bits and rank by layer",
            "Type and rank of each layer, shown if they differ between layers.",
            varying,
            colors=False,
        )


def _errors(artifacts: Sequence[Measured], prefixes: Sequence[str]) -> Section:
    height = 0.9 + 0.36 * len(artifacts)
    return Section(
        "Error",
        "Pale bars are the error of plain rounding, bars in full color the error with the adapter. Calibration on text "
        "makes the error of outputs small; the error of weights may be larger than without it.",
        [
            drawing.panel(charts.bars_of_totals, _HALF, height, artifacts=artifacts, prefix=prefix)
            for prefix in prefixes
        ],
        pair=True,
    )


def _by_kind(artifacts: Sequence[Measured], prefixes: Sequence[str], kinds: int) -> Section:
    height = 0.9 + (0.16 + 0.13 * len(artifacts)) * kinds
    return Section(
        "By kind of module",
        "All layers of a kind together. A ring is the error of plain rounding, a dot the error with the adapter.",
        [drawing.panel(charts.by_kind, _HALF, height, artifacts=artifacts, prefix=prefix) for prefix in prefixes],
        pair=True,
    )


def _singular_values(artifacts: Sequence[Measured]) -> Section:
    return Section(
        "Singular values",
        "The share of ‖s·B·A‖² + ‖W − Q − s·B·A‖² in the largest singular values of the adapter, and in all of them by "
        "kind.",
        [drawing.panel(draw, _HALF, 3.6, artifacts=artifacts) for draw in (charts.captured, charts.captured_by_kind)],
        pair=True,
    )


def _varying(artifacts: Sequence[Measured]) -> Iterator[str]:
    for i, measured in enumerate(artifacts):
        for name, values in (("type", measured.grid_of("codebook")), ("rank", measured.ranks)):
            if values:
                height, title = 0.8 + 0.27 * len({place.kind for place in values}), f"{measured.label}: {name}"
                yield drawing.panel(charts.squares, _WHOLE, height, values=values, artifact=i, title=title)
