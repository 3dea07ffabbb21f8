"""Writes the page of `loftq report`, which needs no network, and the picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from loftq.display import size, visible
from loftq.reporting.measured import OUTPUTS, Measured

_TEMPLATE = "data/report.html"


class _Column(NamedTuple):
    """A column of the totals: a cell for each artifact, and the index of the best one."""

    name: str
    cells: Sequence[str]
    best: int | None


def write_page(artifacts: list[Measured], path: Path) -> None:
    """Write the page that compares artifacts to a file."""
    import jinja2

    from loftq.reporting.drawing import DARK, Palette
    from loftq.reporting.sections import sections

    settings = {
        key: [measured.artifact.manifest["recipe"].get(key) for measured in artifacts]
        for key in _recipe_keys(artifacts)
    }
    texts = {key.replace("_", " "): list(map(_cell, values)) for key, values in settings.items() if any(values)}
    models = list(dict.fromkeys(measured.artifact.manifest["source"]["model"] for measured in artifacts))
    text = resources.files("loftq.reporting").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    page = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined, finalize=_shown
    ).from_string(text)
    rendered = page.render(
        title=", ".join(Path(model).name for model in models),
        outputs=OUTPUTS,
        subtitle=_subtitle(artifacts),
        version=version("loftq"),
        light=Palette(),
        dark=DARK,
        artifacts=artifacts,
        columns=list(_columns(artifacts)),
        sections=list(sections(artifacts)),
        differing={key: values for key, values in texts.items() if any(value != values[0] for value in values)},
        shared={key: values[0] for key, values in texts.items() if all(value == values[0] for value in values)},
        notes=list(
            dict.fromkeys(note for measured in artifacts for note in measured.artifact.manifest.get("notes", ()))
        ),
    )
    path.write_text(rendered, encoding="utf-8")


def _shown(value: Any) -> Any:
    """A value of the page. Texts come from files: the template escapes HTML in them, and this what has no glyph."""
    return visible(value) if type(value) is str else value


def _recipe_keys(artifacts: Sequence[Measured]) -> list[str]:
    return list(dict.fromkeys(key for measured in artifacts for key in measured.artifact.manifest["recipe"]))


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _subtitle(artifacts: Sequence[Measured]) -> str:
    first = artifacts[0].totals
    count = f"{len(artifacts)} artifacts" if len(artifacts) > 1 else "One artifact"
    return (
        f"{count} that loftq made: quantized backbones, and the adapters that correct their errors. "
        f"{first['layers']} linears with {first['weights'] / 1e6:,.1f} M weights are quantized."
    )


def _columns(artifacts: Sequence[Measured]) -> Iterator[_Column]:
    """The totals that at least one artifact has."""
    for name, key, form in (
        ("bits per weight", "bits_per_weight", "{:.2f}".format),
        ("backbone", "backbone_bytes", size),
        ("adapter", "adapter_bytes", size),
        ("error, plain", "plain_error", "{:.4f}".format),
        ("error, with adapter", "error", "{:.4f}".format),
        ("outputs, plain", "output_plain_error", "{:.4f}".format),
        ("outputs, with adapter", "output_error", "{:.4f}".format),
        ("divergence, nats per token", "divergence", "{:.4f}".format),
    ):
        values = [measured.totals.get(key) for measured in artifacts]
        present = [value for value in values if value is not None]
        if present:
            ranked = key in ("error", "output_error", "divergence") and len(present) > 1
            best = values.index(min(present)) if ranked else None
            yield _Column(name, ["" if value is None else form(value) for value in values], best)


def write_picture(artifacts: list[Measured], path: Path) -> None:
    """Write the picture that compares artifacts to a file."""
    from loftq.reporting import charts, drawing

    drawing.png(charts.overview, path, 12.4, 7.6, artifacts=artifacts)
