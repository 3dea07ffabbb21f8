"""The sections of the page of a report: their texts and their plots, for each width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from loftq.reporting import charts, drawing
from loftq.reporting.columns import groups
from loftq.reporting.drawing import Plot
from loftq.reporting.measured import OUTPUTS, WEIGHTS, Measured

_WHOLE, _HALF = 7.1, 5.4  # inches: 682 and 518 pixels


class Plots(NamedTuple):
    """The plots of one width. The title is empty if there is only one width."""

    title: str
    plots: Sequence[Plot]


class Section(NamedTuple):
    """A section of the page."""

    title: str
    text: str
    groups: Sequence[Plots]


def sections(artifacts: Sequence[Measured]) -> Iterator[Section]:
    """The sections for which these artifacts have values to show."""
    prefixes = [prefix for prefix in (OUTPUTS, WEIGHTS) if any(measured.has(prefix) for measured in artifacts)]
    yield Section(
        "By kind of module",
        "All layers of a kind together. A mark is the error with the adapter, a grey line that of plain rounding.",
        _by_width(artifacts, lambda some: [_by_kind(some, prefix) for prefix in prefixes if _has(some, prefix)]),
    )
    for prefix in prefixes:
        yield Section(
            f"By block: {charts.NAMES[prefix]}",
            "The error of each block with the adapter, relative to plain rounding. Each kind of module has a panel.",
            _by_width(artifacts, partial(_depths, prefix=prefix)),
        )
    if any(_traced(artifacts, prefix) for prefix in prefixes):
        yield Section(
            "Iterations",
            "The error after each iteration, relative to plain rounding. Lines are the median layer, bands the middle "
            "half of layers. The best iterate is kept.",
            _by_width(
                artifacts,
                lambda some: [
                    drawing.panel(charts.trace, _HALF, 2.9, artifacts=some, prefix=prefix)
                    for prefix in prefixes
                    if _traced(some, prefix)
                ],
            ),
        )
    yield Section(
        "Singular values",
        "The share of ‖s·B·A‖² + ‖W − Q − s·B·A‖² in the largest singular values of the adapter, and in all of them by "
        "kind.",
        _by_width(artifacts, _captured),
    )
    varying = list(_varying(artifacts))
    if varying:
        yield Section(
            "Bits and rank by layer",
            "Type and rank of each layer, shown if they differ between layers.",
            [Plots("", varying)],
        )


def _by_width(artifacts: Sequence[Measured], plots: Callable[[list[Measured]], list[Plot]]) -> list[Plots]:
    """The plots of the artifacts of each width."""
    found = groups(artifacts)
    made = [(group.title, plots([one for _, one in group.rows])) for group in found]
    return [Plots(title if len(found) > 1 else "", some) for title, some in made if some]


def _has(artifacts: Sequence[Measured], prefix: str) -> bool:
    return any(measured.has(prefix) for measured in artifacts)


def _traced(artifacts: Sequence[Measured], prefix: str) -> bool:
    return any(measured.has(prefix) and measured.trace(prefix).shape[1] > 1 for measured in artifacts)


def _kinds(artifacts: Sequence[Measured]) -> int:
    return len({kind for measured in artifacts for kind in measured.kinds})


def _by_kind(artifacts: Sequence[Measured], prefix: str) -> Plot:
    height = 0.8 + (0.14 + 0.125 * len(artifacts)) * _kinds(artifacts)
    return drawing.panel(charts.by_kind, _HALF, height, artifacts=artifacts, prefix=prefix)


def _depths(artifacts: Sequence[Measured], prefix: str) -> list[Plot]:
    if not _has(artifacts, prefix):
        return []
    wide, narrow = (0.4 + each * -(-_kinds(artifacts) // in_a_row) for each, in_a_row in ((1.6, 4), (1.45, 2)))
    return [drawing.plot(charts.depths, _WHOLE, wide, narrow, artifacts=artifacts, prefix=prefix)]


def _captured(artifacts: Sequence[Measured]) -> list[Plot]:
    heights = (3.2, 0.7 + (0.14 + 0.09 * len(artifacts)) * _kinds(artifacts))
    draws = (charts.captured, charts.captured_by_kind)
    return [
        drawing.panel(draw, _HALF, max(height, 2.4), artifacts=artifacts)
        for draw, height in zip(draws, heights, strict=True)
    ]


def _varying(artifacts: Sequence[Measured]) -> Iterator[Plot]:
    for measured in artifacts:
        for name, values in (("type", measured.types), ("rank", measured.ranks)):
            if values:
                height, title = 0.8 + 0.27 * len({place.kind for place in values}), f"{measured.label}: {name}"
                yield drawing.panel(
                    charts.squares, _WHOLE, height, values=values, artifact=measured.series, title=title
                )
