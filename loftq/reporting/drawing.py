"""Draws the plots of a report, as SVG for the page or as a picture.

A plot for the page is drawn in placeholder colors. In the SVG they are replaced by CSS variables, so that the plot
follows the light or dark style of the page. The text of a plot stays text in the page.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

SERIES = ("#2a78d6", "#e8590c", "#1a9c6b", "#9c36b5", "#c79a00", "#d6336c", "#0b7285", "#6c757d")
DARK = ("#6cb0ff", "#ff9a5c", "#4fd1a1", "#d48ae8", "#f0c84b", "#ff7fa8", "#55c3d4", "#adb5bd")
INK, RULE = "#1c2733", "#d5dbe1"
_PADDED = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.09)  # inches
_STYLE = {
    "font.size": 9.4,  # points: 12.5 pixels of a page
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.75,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.7,
    "legend.frameon": False,
    "text.parse_math": False,  # the name of a folder may contain dollar signs
    "svg.fonttype": "none",
    "svg.hashsalt": "loftq",
}


@dataclass(frozen=True)
class Palette:
    """The colors of the text, the rules, and the artifacts in their order."""

    ink: str = INK
    rule: str = RULE
    series: tuple[str, ...] = SERIES

    def of(self, index: int) -> str:
        """The color of an artifact."""
        return self.series[index % len(self.series)]


_PLACEHOLDERS = Palette("#010203", "#040506", tuple(f"#0708{i:02x}" for i in range(len(SERIES))))
_VARIABLES = {
    _PLACEHOLDERS.ink: "var(--ink)",
    _PLACEHOLDERS.rule: "var(--rule)",
    **{color: f"var(--s{i})" for i, color in enumerate(_PLACEHOLDERS.series)},
}


_SPARED = (  # what a page has no use for: a third of its bytes
    (r" font-family: [^;\"]*;?", ""),
    (r' transform="rotate\(-0 [^"]*\)"', ""),
    (r'<g id="[^"]*">', "<g>"),
)


class Plot(NamedTuple):
    """A plot for screens of any width: drawn for wide ones and again for narrow ones, so that its text has one size.

    Two plots that are `half` as wide as the page stand side by side.
    """

    wide: str
    narrow: str
    half: bool


NARROW = 3.4  # inches, 326 pixels: what a phone has room for


def panel(draw: Callable[..., None], width: float, height: float, **arguments: Any) -> Plot:
    """Like `plot`, for a function that draws on the axes of a single panel."""
    return plot(lambda figure, palette: draw(figure.subplots(), palette, **arguments), width, height, height)


def plot(draw: Callable[..., None], width: float, height: float, narrow_height: float, **arguments: Any) -> Plot:
    """A plot in both widths; sizes in inches."""
    wide, narrow = svg(draw, width, height, **arguments), svg(draw, NARROW, narrow_height, **arguments)
    return Plot(wide, narrow, half=width < 6)


def svg(draw: Callable[..., None], width: float, height: float, **arguments: Any) -> str:
    """A plot as SVG, with its size in inches, for a page with the CSS variables `--ink`, `--rule`, `--s0`, …"""
    with _styled(_PLACEHOLDERS):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure, _PLACEHOLDERS, **arguments)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    source = text.getvalue()
    source = re.sub("|".join(_VARIABLES), lambda color: _VARIABLES[color[0]], source[source.index("<svg") :])
    size = f'width="{width * 96:.0f}" height="{height * 96:.0f}"'
    source = re.sub(r'width="[^"]*pt" height="[^"]*pt"', size, source, count=1)
    for what, instead in _SPARED:
        source = re.sub(what, instead, source)
    source = re.sub(r">[^<]+<|\d+\.\d{3,}", _shorter, source)
    key = hashlib.sha256(source.encode()).hexdigest()[:8]  # names of parts must not be those of another plot
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{key}-", source)


def png(draw: Callable[..., None], path: Path, width: float, height: float, **arguments: Any) -> None:
    """Write a picture with a white background and 160 dots per inch. Its size is in inches."""
    palette = Palette()
    with _styled(palette):
        figure = Figure(figsize=(width, height), layout=_PADDED, facecolor="white", dpi=160)
        FigureCanvasAgg(figure)
        draw(figure, palette, **arguments)
        figure.savefig(path, format="png", metadata={"Software": None})


@contextmanager
def _styled(palette: Palette) -> Any:
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with mpl.rc_context({**_STYLE, "grid.color": palette.rule, **dict.fromkeys(names, palette.ink)}):
        yield


def _shorter(found: re.Match[str]) -> str:
    """A coordinate with two decimals; what is written in the plot stays as it is."""
    return found[0] if found[0].startswith(">") else f"{float(found[0]):.2f}"
