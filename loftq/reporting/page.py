"""`loftq report`: artifacts side by side, as one page that needs no network, or one picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from loftq.display import size
from loftq.reporting.measured import OUTPUTS, Measured

_TEMPLATE = "data/report.html"


class _Column(NamedTuple):
    """A column of the totals: a cell for each artifact, and which is the best."""

    name: str
    cells: Sequence[str]
    best: int | None


def _write_page(found: list[Measured], path: Path) -> None:
    import jinja2

    from loftq.reporting.drawing import DARK, Palette
    from loftq.reporting.sections import sections

    settings = {key: [one.artifact.manifest["recipe"].get(key) for one in found] for key in _recipe_keys(found)}
    told = {key.replace("_", " "): list(map(_cell, values)) for key, values in settings.items() if any(values)}
    models = list(dict.fromkeys(one.artifact.manifest["source"]["model"] for one in found))
    text = resources.files("loftq.reporting").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined).from_string(text)
    rendered = page.render(
        title=", ".join(Path(model).name for model in models),
        outputs=OUTPUTS,
        subtitle=_subtitle(found),
        version=version("loftq"),
        light=Palette(),
        dark=DARK,
        found=found,
        columns=list(_columns(found)),
        sections=list(sections(found)),
        differing={key: values for key, values in told.items() if any(value != values[0] for value in values)},
        shared={key: values[0] for key, values in told.items() if all(value == values[0] for value in values)},
        notes=list(dict.fromkeys(note for one in found for note in one.artifact.manifest.get("notes", ()))),
    )
    path.write_text(rendered, encoding="utf-8")


def _recipe_keys(found: Sequence[Measured]) -> list[str]:
    return list(dict.fromkeys(key for one in found for key in one.artifact.manifest["recipe"]))


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _subtitle(found: Sequence[Measured]) -> str:
    first = found[0].totals
    count = f"{len(found)} artifacts" if len(found) > 1 else "One artifact"
    return (
        f"{count} that loftq made: quantized backbones, and the adapters that repair them. "
        f"{first['layers']} linears with {first['weights'] / 1e6:,.1f} M weights are quantized."
    )


def _columns(found: Sequence[Measured]) -> Iterator[_Column]:
    """The totals that any artifact has."""
    for name, key, form in (
        ("bits a weight", "bits_per_weight", "{:.2f}".format),
        ("backbone", "backbone_bytes", size),
        ("adapter", "adapter_bytes", size),
        ("error, rounded", "plain_error", "{:.4f}".format),
        ("with adapter", "error", "{:.4f}".format),
        ("outputs, rounded", "output_plain_error", "{:.4f}".format),
        ("with adapter", "output_error", "{:.4f}".format),
        ("divergence, nats a token", "divergence", "{:.4f}".format),
    ):
        values = [one.totals.get(key) for one in found]
        known = [value for value in values if value is not None]
        if known:
            ranked = key in ("error", "output_error", "divergence") and len(known) > 1
            best = values.index(min(known)) if ranked else None
            yield _Column(name, ["" if value is None else form(value) for value in values], best)


def _write_picture(found: list[Measured], path: Path) -> None:
    from loftq.reporting import charts, drawing

    drawing.png(charts.overview, path, 12.4, 7.6, found=found)
