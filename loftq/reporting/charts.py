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

from loftq.reporting.drawing import Palette
from loftq.reporting.measured import OUTPUTS, WEIGHTS, Measured, Place

NAMES = {WEIGHTS: "weights", OUTPUTS: "outputs"}
_WIDE = 2.5  # largest of smallest error, from which an axis is logarithmic


def bars_of_totals(axes: Axes, palette: Palette, found: Sequence[Measured], prefix: str) -> None:
    """A bar for each artifact: the plain error behind, what is left before it."""
    for at, one in enumerate(found):
        if f"{prefix}error" not in one.totals:
            axes.annotate(" not measured: made without text", (0, at), va="center", fontsize=8.5, alpha=0.6)
            continue
        plain, left = one.totals[f"{prefix}plain_error"], one.totals[f"{prefix}error"]
        axes.barh(at, plain, height=0.62, color=palette.of(at), alpha=0.25)
        axes.barh(at, left, height=0.34, color=palette.of(at))
        axes.annotate(f" {left:.3f}", (max(left, plain), at), va="center", fontsize=9)
    _list_artifacts(axes, found)
    axes.set_title(f"Error of {NAMES[prefix]}")


def sizes(axes: Axes, palette: Palette, found: Sequence[Measured]) -> None:
    """A bar for each artifact: the backbone's bytes, and behind them the adapter's."""
    for at, one in enumerate(found):
        backbone, adapter = one.totals["backbone_bytes"] / 1e6, one.totals["adapter_bytes"] / 1e6
        axes.barh(at, backbone, height=0.5, color=palette.of(at))
        axes.barh(at, adapter, left=backbone, height=0.5, color=palette.of(at), alpha=0.35)
        axes.annotate(f" {backbone:,.1f} + {adapter:,.1f}", (backbone + adapter, at), va="center", fontsize=9)
    _list_artifacts(axes, found, room=0.3)
    axes.set_title("Backbone and adapter, MB")


def _list_artifacts(axes: Axes, found: Sequence[Measured], room: float = 0.16) -> None:
    """Their labels, and room for figures at the ends of the bars."""
    axes.set_yticks(range(len(found)), [one.label for one in found])
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.margins(x=room)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def by_kind(axes: Axes, palette: Palette, found: Sequence[Measured], prefix: str) -> None:
    """For each kind of module, from the plain error (a ring) to what is left (a dot)."""
    kinds = _kinds(found)
    shown = [(i, one) for i, one in enumerate(found) if one.has(prefix)]
    errors: list[float] = []
    for place, (i, one) in enumerate(shown):
        for at, kind in enumerate(kinds):
            plain, left = one.of_kind(kind, f"{prefix}plain_error"), one.of_kind(kind, f"{prefix}error")
            if plain is None or left is None:
                continue
            y = at + 0.7 * ((place + 0.5) / len(shown) - 0.5)
            errors += [plain, left]
            axes.plot([plain, left], [y, y], color=palette.of(i), linewidth=1.4, alpha=0.55)
            axes.plot(plain, y, "o", color=palette.of(i), markersize=5, markerfacecolor="none", markeredgewidth=1.2)
            axes.plot(left, y, "o", color=palette.of(i), markersize=5)
    _list_kinds(axes, kinds)
    _scale(axes, errors, "x")
    axes.set_title(f"Error of {NAMES[prefix]} by kind")


def by_depth(
    axes: Axes, palette: Palette, found: Sequence[Measured], prefix: str, kind: str | None = None
) -> list[float]:
    """The error of each block: plain dotted, what is left as a line. Returns all that is shown."""
    shown: list[float] = []
    for i, one in enumerate(found):
        for key, line, width in (("plain_error", ":", 1.1), ("error", "-", 1.7)):
            errors = one.by_depth(f"{prefix}{key}", kind)
            axes.plot(list(errors), list(errors.values()), line, color=palette.of(i), linewidth=width)
            shown += errors.values()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return shown


def depth(axes: Axes, palette: Palette, found: Sequence[Measured], prefix: str) -> None:
    """All layers of a block together."""
    _scale(axes, by_depth(axes, palette, found, prefix), "y")
    axes.set_xlabel("block")
    axes.set_title(f"Error of {NAMES[prefix]} by block")


def depths(figure: Figure, palette: Palette, found: Sequence[Measured], prefix: str) -> None:
    """A panel for each kind of module, with one scale."""
    kinds = _kinds(found)
    columns = min(len(kinds), 4)
    panels = figure.subplots(-(-len(kinds) // columns), columns, sharex=True, sharey=True, squeeze=False).flat
    shown: list[float] = []
    for axes, kind in zip(panels, kinds, strict=False):
        shown += by_depth(axes, palette, found, prefix, kind)
        axes.set_title(kind)
    for axes in list(figure.axes)[len(kinds) :]:
        axes.set_visible(False)
    _scale(figure.axes[0], shown, "y")


def trace(axes: Axes, palette: Palette, found: Sequence[Measured], prefix: str) -> None:
    """What is left of the plain error after each iteration: the median layer, and the middle half of them."""
    for i, one in enumerate(found):
        if one.has(prefix):
            _band(axes, one.trace(prefix), palette.of(i), "o-")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("iteration")
    axes.set_title(f"Error of {NAMES[prefix]} / rounding's")


def captured(axes: Axes, palette: Palette, found: Sequence[Measured]) -> None:
    """How much of what rounding left the first singular values of the adapter hold: as above, of layers."""
    for i, one in enumerate(found):
        _band(axes, one.captured(), palette.of(i), "-")
    axes.set_xlabel("singular values")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(bottom=0)
    axes.set_title("Share of Q's error in the adapter")


def captured_by_kind(axes: Axes, palette: Palette, found: Sequence[Measured]) -> None:
    """The share that the whole adapter holds, by kind of module: the median layer, and the middle half of them."""
    kinds = _kinds(found)
    for i, one in enumerate(found):
        for kind in one.kinds:
            low, middle, high = _quartiles(one.captured(kind)[:, -1:])
            y = kinds.index(kind) + 0.7 * ((i + 0.5) / len(found) - 0.5)
            axes.plot([low[0], high[0]], [y, y], color=palette.of(i), linewidth=3.5, alpha=0.3)
            axes.plot(middle[0], y, "o", color=palette.of(i), markersize=5)
    _list_kinds(axes, kinds)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlim(left=0)
    axes.set_title("By kind of module")


def squares(axes: Axes, palette: Palette, values: Mapping[Place, Any], artifact: int, title: str) -> None:
    """A square for each layer, the darker the larger its value is among the others: blocks from left to right."""
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


def overview(figure: Figure, palette: Palette, found: Sequence[Measured]) -> None:
    """One picture of it all: of outputs, where every artifact was made with text, and of weights otherwise."""
    prefix = OUTPUTS if all(one.has(OUTPUTS) for one in found) else WEIGHTS
    models = ", ".join(dict.fromkeys(Path(one.artifact.manifest["source"]["model"]).name for one in found))
    figure.suptitle(f"{models}    (pale, ring, dotted: plain rounding; full: with the adapter)", x=0.01, ha="left")
    panels = figure.subplots(2, 3)
    sizes(panels[0][0], palette, found)
    bars_of_totals(panels[0][1], palette, found, WEIGHTS)
    panels[0][1].set_yticklabels([])
    if prefix == OUTPUTS:
        bars_of_totals(panels[0][2], palette, found, OUTPUTS)
        panels[0][2].set_yticklabels([])
    else:
        captured(panels[0][2], palette, found)
    by_kind(panels[1][0], palette, found, prefix)
    depth(panels[1][1], palette, found, prefix)
    trace(panels[1][2], palette, found, prefix)
    lines = [Line2D([], [], color=palette.of(i), linewidth=5) for i in range(len(found))]
    columns = len(found) if len(found) < 5 else -(-len(found) // 2)
    figure.legend(lines, [one.label for one in found], loc="outside lower center", ncols=columns)


def _kinds(found: Sequence[Measured]) -> list[str]:
    return list(dict.fromkeys(kind for one in found for kind in one.kinds))


def _list_kinds(axes: Axes, kinds: Sequence[str]) -> None:
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_ylim(len(kinds) - 0.45, -0.55)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _quartiles(values: torch.Tensor) -> torch.Tensor:
    """Of values (layers, steps): (3, steps)."""
    return torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype), dim=0)


def _band(axes: Axes, values: torch.Tensor, color: str, line: str) -> None:
    if values.numel():
        low, middle, high = _quartiles(values)
        steps = range(values.shape[1])
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(steps, middle, line, color=color, markersize=3.5)


def _scale(axes: Axes, errors: Iterable[float], axis: str) -> None:
    """Logarithmic, with round ticks, where errors are far apart."""
    positive = [error for error in errors if error > 0]
    if positive and max(positive) > _WIDE * min(positive):
        target = axes.xaxis if axis == "x" else axes.yaxis
        getattr(axes, f"set_{axis}scale")("log")
        target.set_minor_formatter(NullFormatter())
        rounded = [digit * 10.0**power for power in range(-9, 2) for digit in (1, 2, 5)]
        target.set_ticks([tick for tick in rounded if min(positive) * 0.8 <= tick <= max(positive) * 1.25])
        target.set_major_formatter(ScalarFormatter())
