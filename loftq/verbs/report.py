"""`loftq report`: compares artifacts on a page that needs no network, or in a picture."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path

from loftq.errors import OptionError, OutputError
from loftq.formats.disk import replacing
from loftq.reporting.figures import Figures, figures
from loftq.reporting.measured import Measured, measure
from loftq.reporting.page import write_page, write_picture
from loftq.reporting.sweep_record import COMPLETE, read_sweep

_MOST = 60  # artifacts: more of them make a page that nobody reads


def report(
    folders: Sequence[str | Path],
    *,
    html: str | Path | None = None,
    png: str | Path | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Compare artifacts: write a page `html`, a picture `png`, or both. Returns the paths of the written files.

    The manifest and the factors of the adapter are read from each folder. Raises ArtifactError for a folder that loftq
    did not write, OptionError if neither file is named or if matplotlib or jinja2 is not installed, and OutputError if
    a file exists already.
    """
    folders = [folders] if isinstance(folders, (str, Path)) else list(folders)
    if html is None and png is None:
        raise OptionError("nothing to write: name a page with --html, a picture with --png, or both")
    _require("matplotlib", "jinja2")
    names = (Path(folder).absolute().name for folder in folders)
    command = shlex.join(["loftq", "report", *names, "--html", "report.html" if html is None else Path(html).name])
    writers: tuple[Callable[[list[Measured], Path], None], ...] = (
        partial(write_page, command=command),
        write_picture,
    )
    targets = [(Path(path), write) for path, write in zip((html, png), writers, strict=True) if path is not None]
    for path, _ in targets:
        _check_target(path, overwrite)
    artifacts = _measured(folders)
    for path, write in targets:
        with _explain_refusals(path), replacing(path) as scratch:
            write(artifacts, scratch)
    return [path for path, _ in targets]


def report_figures(folders: Sequence[str | Path]) -> Figures:
    """The figures that a report compares, for other programs. Raises the errors of `report`."""
    return figures(_measured(folders))


def _measured(folders: Sequence[str | Path]) -> list[Measured]:
    cells = _cells([folders] if isinstance(folders, (str, Path)) else folders)
    if not 1 <= len(cells) <= _MOST:
        raise OptionError(f"{len(cells)} folders: a report compares 1 to {_MOST}")
    return measure(cells)


def _cells(folders: Sequence[str | Path]) -> list[Path]:
    """The folders, with those of its complete cells in place of the folder of a sweep: of several seeds, the first."""
    found: list[Path] = []
    for folder in map(Path, folders):
        record = read_sweep(folder)
        if record is None:
            found.append(folder)
            continue
        first: dict[tuple[object, ...], Path] = {}
        for row in record["cells"]:
            if row["status"] == COMPLETE:
                first.setdefault((row["bits"], row["rank"], row["method"]), folder / row["cell"])
        found += first.values()
    return found


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
        raise OutputError(f"{path} exists already: add --overwrite, or name another file")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path.absolute().parent} does not exist: create it first, or name another file")


@contextmanager
def _explain_refusals(path: Path) -> Iterator[None]:
    """Turn a system error about a file that cannot be written into an OutputError with the next step."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}: name another file") from error
