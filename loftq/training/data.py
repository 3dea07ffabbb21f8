"""Reads rows to train on from text, JSON, CSV, TSV or Parquet files, or from a data set on the Hub."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq.display import one_line
from loftq.errors import LoftQError, OptionError
from loftq.formats.disk import explain_os_errors
from loftq.hub.encodings import check_utf8
from loftq.hub.errors import explain_data
from loftq.training.json_rows import check_json, find_bad_row
from loftq.training.tables import read_tables

if TYPE_CHECKING:
    from datasets import Dataset

_TABLE = "read_tables"  # ours; the other readers are those of `datasets`
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("from_text", {"sample_by": "document", "encoding": "utf-8-sig"}),
    ".jsonl": ("from_json", {}),
    ".json": ("from_json", {}),
    ".csv": (_TABLE, {"delimiter": ","}),
    ".tsv": (_TABLE, {"delimiter": "\t"}),
    ".parquet": ("from_parquet", {}),
}
_NO_ROWS = re.compile("corresponds to no data|No columns to parse")
_JSON = (".jsonl", ".json")
_HELD_OUT = 20  # one example in this many is held out
_MOST_HELD_OUT = 500
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.\[\]:%-]+))?")


def read_rows(names: Sequence[str], option: str = "--data") -> Dataset:
    """Read the rows of files of the same kind, or of a data set on the Hub.

    A data set is named `OWNER/NAME[:CONFIG][@SPLIT]`; the default split is `train`. Raises OptionError for data that
    cannot be read or that has no rows.
    """
    datasets = _library(names, option)
    paths = [Path(name).expanduser() for name in names]
    if len(names) == 1 and paths[0].suffix.lower() not in _READERS and not paths[0].exists():
        rows = _hub_rows(datasets, names[0], option)
    else:
        _check_files(paths, option)
        rows = _file_rows(datasets, paths, option)
    if not len(rows):
        raise OptionError(f"{option} {', '.join(names)}: has no rows: name other data")
    return _undecoded(datasets, rows)


def _undecoded(datasets: Any, rows: Dataset) -> Dataset:
    """The rows with their images as bytes or paths, which are read when they are needed."""
    for name, feature in rows.features.items():
        one = getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)
        if isinstance(one, datasets.Image):
            plain = datasets.Image(decode=False)
            rows = rows.cast_column(name, plain if one is feature else datasets.List(plain))
    return rows


def are_texts(names: Sequence[str]) -> bool:
    """Whether all names are those of .txt files, each of which is a single row."""
    return all(Path(name).suffix.lower() == ".txt" for name in names)


def _check_files(paths: Sequence[Path], option: str) -> None:
    for path in paths:
        if path.is_dir():
            raise OptionError(f"{option} {path}: is a folder: name each file in it with {option}")
        if not path.is_file():
            raise OptionError(f"{option} {path}: no such file")
        if path.suffix.lower() not in _READERS:
            raise OptionError(f"{option} {path}: expected a {', '.join(_READERS)} file or a data set on the Hub")
    if any(_READERS[path.suffix.lower()] != _READERS[paths[0].suffix.lower()] for path in paths):
        raise OptionError(f"{option} {', '.join(map(str, paths))}: expected files of the same kind")
    for path in paths:
        try:
            if path.suffix.lower() != ".parquet":
                check_utf8(path, f"{option} {path}:")
            if path.suffix.lower() in _JSON:
                check_json(path, f"{option} {path}: cannot be read")
        except OSError as error:
            raise OptionError(f"{option} {path}: cannot be read: {error.strerror}") from error


def _library(names: Sequence[str], option: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise OptionError(
            f"{option} {names[0]}: reading it needs the datasets package: pip install 'loftq[train]'"
        ) from error
    return datasets


def _file_rows(datasets: Any, paths: Sequence[Path], option: str) -> Dataset:
    reader, settings = _READERS[paths[0].suffix.lower()]
    files = [str(path) for path in paths]
    try:
        with _silent(datasets), explain_cache_errors():
            if reader == _TABLE:
                return read_tables(paths, settings["delimiter"], option)
            # `load_dataset` would report its use over the network
            return getattr(datasets.Dataset, reader)(files, **settings)
    except LoftQError:
        raise
    except Exception as error:  # each reader has its own errors
        cause = error.__cause__ or error
        if isinstance(cause, LoftQError):
            raise cause from error
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            with explain_cache_errors():
                raise cause from error
        if _NO_ROWS.search(str(cause)) or isinstance(cause, StopIteration):
            raise OptionError(f"{option} {', '.join(files)}: has no rows: name other data") from error
        if reader == "from_json":
            for path in paths:
                find_bad_row(path, f"{option} {path}: cannot be read")
        raise OptionError(f"{option} {', '.join(files)}: cannot be read: {one_line(cause, 300)}") from error


@contextmanager
def _silent(datasets: Any) -> Iterator[None]:
    """Keep the library from printing an error that is also raised."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)


@contextmanager
def explain_cache_errors() -> Iterator[None]:
    """Turn an error from the disk of the cache, where `datasets` keeps copies of rows, into an OutputError."""
    from datasets import config

    with explain_os_errors(Path(config.HF_DATASETS_CACHE), "HF_DATASETS_CACHE"):
        yield


def _hub_rows(datasets: Any, name: str, option: str) -> Dataset:
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise OptionError(
            f"{option} {name}: no such file, and not the name of a data set on the Hub (OWNER/NAME[:CONFIG][@SPLIT])"
        )
    with explain_data(match["name"], f"{option} {name}"):
        return datasets.load_dataset(match["name"], match["config"], split=match["split"] or "train")


def hold_out(examples: Dataset, seed: int, *, shuffle: bool) -> tuple[Dataset, Dataset | None]:
    """Split examples into a part to train on and a part to evaluate on, which is None if there are fewer than two.

    The second part is a twentieth of the examples, at most 500: the last ones, or with `shuffle` random ones.
    """
    count = min(max(len(examples) // _HELD_OUT, 1), _MOST_HELD_OUT)
    if len(examples) < 2:
        return examples, None
    parts = examples.train_test_split(count, seed=seed, shuffle=shuffle)
    return parts["train"], parts["test"]
