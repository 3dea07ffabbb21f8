"""`loftq report`: artifacts side by side, as one page that needs no network, or one picture."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module, resources
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from loftq.display import size
from loftq.errors import OptionError, OutputError
from loftq.reporting.measured import OUTPUTS, Measured, measure

_TEMPLATE = "data/report.html"
_MOST = 8  # artifacts that colors tell apart


class _Column(NamedTuple):
    """A column of the totals: a cell for each artifact, and which is the best."""

    name: str
    cells: Sequence[str]
    best: int | None


def report(
    folders: Sequence[str | Path],
    *,
    html: str | Path | None = None,
    png: str | Path | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Compare artifacts: write a page `html`, a picture `png`, or both. Returns what was written.

    Of each folder the manifest and the adapter's factors are read. Raises ArtifactError for folders that are none of
    ours, OptionError where there is nothing to do or matplotlib and jinja2 are not installed, and OutputError where a
    file is in the way.
    """
    folders = [folders] if isinstance(folders, (str, Path)) else list(folders)
    if html is None and png is None:
        raise OptionError("nothing to write: name a page with --html, a picture with --png, or both")
    if not 1 <= len(folders) <= _MOST:
        raise OptionError(f"{len(folders)} folders: a report is of 1 to {_MOST}")
    _require("matplotlib", "jinja2")
    makers: tuple[Callable[[list[Measured], Path], None], ...] = (_write_page, _write_picture)
    wanted = [(Path(path), make) for path, make in zip((html, png), makers, strict=True) if path is not None]
    for path, _ in wanted:
        _check_target(path, overwrite)
    found = measure(folders)
    for path, make in wanted:
        with _replacing(path) as scratch:
            make(found, scratch)
    return [path for path, _ in wanted]


def _require(*names: str) -> None:
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise OptionError(f"a report needs {name}: pip install loftq[report]") from error


def _check_target(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise OutputError(f"{path} is a folder: name a file")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} is there already: add --overwrite, or name another file")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path.absolute().parent} is not there: make it first, or name another file")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside another, whose place it takes if nothing goes wrong."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.absolute().parent)
        os.close(descriptor)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}: name another file") from error
    scratch = Path(name)
    try:
        yield scratch
        scratch.chmod(0o644)
        scratch.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}: name another file") from error
    finally:
        scratch.unlink(missing_ok=True)


def _write_page(found: list[Measured], path: Path) -> None:
    import jinja2

    from loftq.reporting.charts import DARK, Palette
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
    from loftq.reporting import charts

    charts.png(charts.overview, path, 12.4, 7.6, found=found)
