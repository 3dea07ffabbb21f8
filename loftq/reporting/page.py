"""Writes the page of `loftq report`, which needs no network, and the picture."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loftq.display import visible
from loftq.reporting.columns import columns, conclusion, groups
from loftq.reporting.figures import figures, without_folders
from loftq.reporting.measured import OUTPUTS, Measured

_TEMPLATE = "data/report.html"
_MARKS = (  # the marks of the plots, in the order of `charts.MARKS`
    "M5.5 1a4.5 4.5 0 1 0 0 9a4.5 4.5 0 1 0 0-9z",
    "M1.5 1.5h8v8h-8z",
    "M5.5 0L11 5.5L5.5 11L0 5.5z",
    "M5.5 0.5L10.5 10H0.5z",
    "M5.5 10.5L10.5 1H0.5z",
)


def write_page(artifacts: list[Measured], path: Path, command: str = "loftq report") -> None:
    """Write the page that compares artifacts to a file. `command` is shown as what has made it."""
    import jinja2

    from loftq.reporting.drawing import DARK, Palette
    from loftq.reporting.sections import sections

    differing, shared = _settings(artifacts)
    models = list(dict.fromkeys(measured.artifact.manifest["source"]["model"] for measured in artifacts))
    notes = (note for measured in artifacts for note in measured.artifact.manifest.get("notes", ()))
    data = figures(artifacts)
    text = resources.files("loftq.reporting").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    page = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined, finalize=_shown
    ).from_string(text)
    rendered = page.render(
        title=", ".join(Path(model).name for model in models),
        outputs=OUTPUTS,
        subtitle=_subtitle(artifacts),
        conclusion=conclusion(artifacts),
        version=version("loftq"),
        date=datetime.now(UTC).date().isoformat(),
        command=command,
        light=Palette(),
        dark=DARK,
        marks=_MARKS,
        artifacts=artifacts,
        legend=list({measured.series: measured.name for measured in artifacts}.items()),
        groups=groups(artifacts),
        columns=list(columns(artifacts)),
        sections=list(sections(artifacts)),
        differing=differing,
        shared=shared,
        notes=list(dict.fromkeys(map(without_folders, notes))),
        csv=_download("text/csv", data.csv()),
        json=_download("application/json", data.json()),
    )
    path.write_text(rendered, encoding="utf-8")


def _download(kind: str, text: str) -> str:
    """The address of a file that the page itself holds."""
    return f"data:{kind};base64,{base64.b64encode(text.encode()).decode()}"


def _settings(artifacts: Sequence[Measured]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The settings by name: those that differ between artifacts, with a text for each, and those that do not."""
    recipes = [measured.artifact.manifest["recipe"] for measured in artifacts]
    texts = {name: [_cell(recipe.get(name)) for recipe in recipes] for recipe in recipes for name in recipe}
    named = {name.replace("_", " "): values for name, values in texts.items() if any(values)}
    differing = {name: values for name, values in named.items() if any(value != values[0] for value in values)}
    return differing, {name: values[0] for name, values in named.items() if name not in differing}


def _shown(value: Any) -> Any:
    """A value of the page. Texts come from files: the template escapes HTML in them, and this what has no glyph."""
    return visible(value) if type(value) is str else value


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else without_folders(str(value))


def _subtitle(artifacts: Sequence[Measured]) -> str:
    first = artifacts[0].totals
    count = f"{len(artifacts)} artifacts" if len(artifacts) > 1 else "One artifact"
    return (
        f"{count} that loftq made: quantized backbones, and the adapters that correct their errors. "
        f"{first['layers']} linears with {first['weights'] / 1e6:,.1f} M weights are quantized."
    )


def write_picture(artifacts: list[Measured], path: Path) -> None:
    """Write the picture that compares artifacts to a file."""
    from loftq.reporting import charts, drawing

    drawing.png(charts.overview, path, 12.4, 7.6, artifacts=artifacts)
