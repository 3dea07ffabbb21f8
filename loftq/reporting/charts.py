"""The plots of a report, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter, ScalarFormatter

from loftq.display import visible
from loftq.reporting.drawing import Palette
from loftq.reporting.measured import OUTPUTS, WEIGHTS, Measured, Place

NAMES = {WEIGHTS: "weights", OUTPUTS: "outputs"}
# Series are told apart by color, and where colors come again or are not seen, by marks and dashes.
MARKS = ("o", "s", "D", "^", "v")
LINES: Sequence[Any] = ("-", (0, (5, 1.4)), (0, (1.6, 1.1)), (0, (6, 1.2, 1.4, 1.2)))
_WIDE = 2.5  # ratio of the largest to the smallest error from which an axis is logarithmic


def bars_of_totals(axes: Axes, palette: Palette, artifacts: Sequence[Measured], prefix: str) -> None:
    """A bar for each artifact: the error of plain rounding, pale, and the error with the adapter in front of it."""
    for at, measured in enumerate(artifacts):
        if f"{prefix}error" not in measured.totals:
            axes.annotate(" not measured: made without text", (0, at), va="center", fontsize=8.5, alpha=0.6)
            continue
        plain, final = measured.totals[f"{prefix}plain_error"], measured.totals[f"{prefix}error"]
        axes.barh(at, plain, height=0.62, color=palette.of(measured.series), alpha=0.25)
        axes.barh(at, final, height=0.62, color=palette.of(measured.series))
        axes.annotate(f" {final:.3f}", (max(final, plain), at), va="center", fontsize=9)
    _list_artifacts(axes, artifacts)
    axes.set_title(f"Error of {NAMES[prefix]}")


def sizes(axes: Axes, palette: Palette, artifacts: Sequence[Measured]) -> None:
    """A bar for each artifact: the bytes of the backbone, followed by those of the adapter."""
    for at, measured in enumerate(artifacts):
        backbone, adapter = measured.totals["backbone_bytes"] / 1e6, measured.totals["adapter_bytes"] / 1e6
        axes.barh(at, backbone, height=0.5, color=palette.of(measured.series))
        axes.barh(at, adapter, left=backbone, height=0.5, color=palette.of(measured.series), alpha=0.35)
        axes.annotate(f" {backbone:,.1f} + {adapter:,.1f}", (backbone + adapter, at), va="center", fontsize=9)
    _list_artifacts(axes, artifacts, room=0.3)
    axes.set_title("Backbone and adapter, MB")


def _list_artifacts(axes: Axes, artifacts: Sequence[Measured], room: float = 0.16) -> None:
    """Write the labels of the artifacts, and leave room for numbers at the ends of the bars."""
    axes.set_yticks(range(len(artifacts)), [measured.label for measured in artifacts])
    axes.set_ylim(len(artifacts) - 0.4, -0.6)
    axes.margins(x=room)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def by_kind(axes: Axes, palette: Palette, artifacts: Sequence[Measured], prefix: str) -> None:
    """For each kind of module, the error with the adapter of each artifact, and a line where plain rounding has it."""
    kinds = _kinds(artifacts)
    shown = [measured for measured in artifacts if measured.has(prefix)]
    errors: list[float] = []
    for place, measured in enumerate(shown):
        for at, kind in enumerate(kinds):
            plain, final = measured.of_kind(kind, f"{prefix}plain_error"), measured.of_kind(kind, f"{prefix}error")
            if plain is None or final is None:
                continue
            y = at + 0.72 * ((place + 0.5) / len(shown) - 0.5)
            errors += [plain, final]
            half = 0.36 / len(shown)
            axes.plot([plain, plain], [y - half, y + half], color=palette.ink, linewidth=1.6, alpha=0.45)
            axes.plot([plain, final], [y, y], color=palette.of(measured.series), linewidth=1.2, alpha=0.45)
            _mark(axes, final, y, palette, measured.series)
    _list_kinds(axes, kinds)
    _scale(axes, errors, "x")
    axes.set_title(f"Error of {NAMES[prefix]} by kind")


def by_depth(
    axes: Axes, palette: Palette, artifacts: Sequence[Measured], prefix: str, kind: str | None = None
) -> list[float]:
    """The error of each block with the adapter, relative to that of plain rounding. Returns all of them."""
    shown: list[float] = []
    for measured in artifacts:
        plain, final = (measured.by_depth(f"{prefix}{key}", kind) for key in ("plain_error", "error"))
        shares = {depth: error / plain[depth] for depth, error in final.items() if plain.get(depth)}
        style = LINES[measured.series % len(LINES)]
        mark = MARKS[measured.series % len(MARKS)] if len(shares) < 3 else ""
        axes.plot(
            list(shares),
            list(shares.values()),
            linestyle=style,
            color=palette.of(measured.series),
            marker=mark,
            markersize=4,
        )
        shown += shares.values()
    axes.axhline(1, color=palette.ink, linewidth=1, alpha=0.45)
    axes.set_ylim(0, max(1.05, *(1.05 * share for share in shown)) if shown else 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    return shown


def depth(axes: Axes, palette: Palette, artifacts: Sequence[Measured], prefix: str) -> None:
    """The error of each block, for all of its layers together, relative to plain rounding."""
    by_depth(axes, palette, artifacts, prefix)
    axes.set_xlabel("block")
    axes.set_title(f"Error of {NAMES[prefix]} / plain rounding")


def depths(figure: Figure, palette: Palette, artifacts: Sequence[Measured], prefix: str) -> None:
    """The same in a panel for each kind of module, as many in a row as there is room for. All have the same scale."""
    kinds = _kinds(artifacts)
    columns = min(len(kinds), 4 if figure.get_figwidth() > 5 else 2)
    panels = figure.subplots(-(-len(kinds) // columns), columns, sharex=True, sharey=True, squeeze=False).flat
    shown: list[float] = []
    for axes, kind in zip(panels, kinds, strict=False):
        shown += by_depth(axes, palette, artifacts, prefix, kind)
        axes.set_title(kind, fontweight="normal")
    for axes in list(figure.axes)[len(kinds) :]:
        axes.set_visible(False)
    figure.axes[0].set_ylim(0, max([1.05, *(1.05 * share for share in shown)]))


def trace(axes: Axes, palette: Palette, artifacts: Sequence[Measured], prefix: str) -> None:
    """The error after each iteration, relative to plain rounding: the median layer and the middle half of layers."""
    for measured in artifacts:
        if measured.has(prefix):
            _band(axes, measured.trace(prefix), palette, measured.series, MARKS[measured.series % len(MARKS)])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("iteration")
    axes.set_title(f"Error of {NAMES[prefix]} / plain rounding")


def captured(axes: Axes, palette: Palette, artifacts: Sequence[Measured]) -> None:
    """The share of the rounding error in the first singular values of the adapter: median and middle half of layers."""
    for measured in artifacts:
        _band(axes, measured.captured(), palette, measured.series)
    axes.set_xlabel("singular values")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(bottom=0)
    axes.set_title("Share of Q's error in the adapter")


def captured_by_kind(axes: Axes, palette: Palette, artifacts: Sequence[Measured]) -> None:
    """The share of the whole adapter, by kind of module: the median layer and the middle half of layers."""
    kinds = _kinds(artifacts)
    for i, measured in enumerate(artifacts):
        for kind in measured.kinds:
            low, middle, high = _quartiles(measured.captured(kind)[:, -1:])
            y = kinds.index(kind) + 0.7 * ((i + 0.5) / len(artifacts) - 0.5)
            axes.plot([low[0], high[0]], [y, y], color=palette.of(measured.series), linewidth=3.5, alpha=0.3)
            _mark(axes, float(middle[0]), y, palette, measured.series)
    _list_kinds(axes, kinds)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlim(left=0)
    axes.set_title("By kind of module")


def squares(axes: Axes, palette: Palette, values: Mapping[Place, Any], artifact: int, title: str) -> None:
    """A square for each layer, with the blocks from left to right. A larger value has a darker color."""
    kinds = list(dict.fromkeys(place.kind for place in values))
    order, color = sorted(set(values.values()), reverse=True), palette.of(artifact)
    for index, value in enumerate(order):
        at = [(place.depth, kinds.index(place.kind)) for place, other in values.items() if other == value]
        lefts, rows = [x - 0.45 for x, _ in at], [y for _, y in at]
        shade = 1 - 0.75 * index / (len(order) - 1)
        axes.barh(rows, 0.9, left=lefts, height=0.86, color=color, alpha=shade, linewidth=0, label=str(value))
    _list_kinds(axes, kinds)
    axes.grid(visible=False)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), handlelength=1)


def overview(figure: Figure, palette: Palette, artifacts: Sequence[Measured]) -> None:
    """An overview in one picture: errors of outputs if every artifact was made with text, otherwise of weights."""
    prefix = OUTPUTS if all(measured.has(OUTPUTS) for measured in artifacts) else WEIGHTS
    models = ", ".join(
        dict.fromkeys(Path(measured.artifact.manifest["source"]["model"]).name for measured in artifacts)
    )
    figure.suptitle(f"{visible(models)}    (pale bars, grey lines: plain rounding)", x=0.01, ha="left")
    panels = figure.subplots(2, 3)
    sizes(panels[0][0], palette, artifacts)
    bars_of_totals(panels[0][1], palette, artifacts, WEIGHTS)
    panels[0][1].set_yticklabels([])
    if prefix == OUTPUTS:
        bars_of_totals(panels[0][2], palette, artifacts, OUTPUTS)
        panels[0][2].set_yticklabels([])
    else:
        captured(panels[0][2], palette, artifacts)
    by_kind(panels[1][0], palette, artifacts, prefix)
    depth(panels[1][1], palette, artifacts, prefix)
    trace(panels[1][2], palette, artifacts, prefix)
    lines = [Line2D([], [], color=palette.of(measured.series), linewidth=5) for measured in artifacts]
    columns = len(artifacts) if len(artifacts) < 5 else -(-len(artifacts) // 2)
    figure.legend(lines, [measured.label for measured in artifacts], loc="outside lower center", ncols=columns)


def _kinds(artifacts: Sequence[Measured]) -> list[str]:
    return list(dict.fromkeys(kind for measured in artifacts for kind in measured.kinds))


def _list_kinds(axes: Axes, kinds: Sequence[str]) -> None:
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_ylim(len(kinds) - 0.45, -0.55)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _quartiles(values: torch.Tensor) -> torch.Tensor:
    """The quartiles (3, steps) of values (layers, steps)."""
    return torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype), dim=0)


def _mark(axes: Axes, x: float, y: float, palette: Palette, series: int) -> None:
    axes.plot(x, y, MARKS[series % len(MARKS)], color=palette.of(series), markersize=5.5, markeredgewidth=0)


def _band(axes: Axes, values: torch.Tensor, palette: Palette, series: int, mark: str | None = None) -> None:
    if values.numel():
        low, middle, high = _quartiles(values)
        steps, color = range(values.shape[1]), palette.of(series)
        axes.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
        axes.plot(steps, middle, linestyle=LINES[series % len(LINES)], marker=mark, color=color, markersize=4)


def _scale(axes: Axes, errors: Iterable[float], axis: str) -> None:
    """Make an axis logarithmic, with round ticks, if the errors differ much."""
    positive = [error for error in errors if error > 0]
    if positive and max(positive) > _WIDE * min(positive):
        target = axes.xaxis if axis == "x" else axes.yaxis
        getattr(axes, f"set_{axis}scale")("log")
        target.set_minor_formatter(NullFormatter())
        rounded = [digit * 10.0**power for power in range(-9, 2) for digit in (1, 2, 5)]
        target.set_ticks([tick for tick in rounded if min(positive) * 0.8 <= tick <= max(positive) * 1.25])
        target.set_major_formatter(ScalarFormatter())
