"""`loftq report`: artifacts side by side, as one page that needs no network, or one picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from loftq.errors import OptionError, OutputError
from loftq.formats.disk import replacing
from loftq.reporting.measured import Measured, measure
from loftq.reporting.page import _write_page, _write_picture

_MOST = 8  # artifacts that colors tell apart


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
        with _explain_refusals(path), replacing(path) as scratch:
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
def _explain_refusals(path: Path) -> Iterator[None]:
    """Turn what the system says of a file that cannot be written into an OutputError with the next step."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}: name another file") from error
