"""Rows to train on: text, JSON lines, CSV, TSV or Parquet files, or a data set on the Hub, read by `datasets`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq.display import one_line
from loftq.errors import OptionError
from loftq.hub.errors import explain_data

if TYPE_CHECKING:
    from datasets import Dataset

_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("from_text", {"sample_by": "document"}),
    ".jsonl": ("from_json", {}),
    ".json": ("from_json", {}),
    ".csv": ("from_csv", {}),
    ".tsv": ("from_csv", {"delimiter": "\t"}),
    ".parquet": ("from_parquet", {}),
}
_HELD_OUT = 20  # of so many examples, one
_MOST_HELD_OUT = 500
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.\[\]:%-]+))?")


def read_rows(names: Sequence[str], option: str = "--data") -> Dataset:
    """The rows of files of one kind, or of a data set on the Hub: `OWNER/NAME[:CONFIG][@SPLIT]`, by default `train`.

    Raises OptionError for what cannot be read, and for what holds no rows.
    """
    datasets = _library(names, option)
    paths = [Path(name).expanduser() for name in names]
    if len(names) == 1 and paths[0].suffix.lower() not in _READERS and not paths[0].exists():
        rows = _hub_rows(datasets, names[0], option)
    else:
        _check_files(paths, option)
        rows = _file_rows(datasets, paths, option)
    if not len(rows):
        raise OptionError(f"{option} {', '.join(names)}: holds no rows")
    return rows


def _check_files(paths: Sequence[Path], option: str) -> None:
    for path in paths:
        if path.is_dir():
            raise OptionError(f"{option} {path}: is a folder: name the files in it, each with {option}")
        if not path.is_file():
            raise OptionError(f"{option} {path}: no such file")
        if path.suffix.lower() not in _READERS:
            raise OptionError(f"{option} {path}: expected a {', '.join(_READERS)} file, or a data set on the Hub")
    if any(_READERS[path.suffix.lower()] != _READERS[paths[0].suffix.lower()] for path in paths):
        raise OptionError(f"{option} {', '.join(map(str, paths))}: expected files of one kind")
    for path in paths:
        if path.suffix.lower() != ".parquet":
            _check_encoding(path, option)


def _check_encoding(path: Path, option: str) -> None:
    """Readers pass bytes that are no text on, and rows fail later."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise OptionError(
                    f"{option} {path}: line {number} is not UTF-8 ({error.reason}): save it as UTF-8"
                ) from error


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
        if reader == "from_csv":
            settings = {**settings, **_as_text(datasets, files[0], settings.get("delimiter", ","))}
        return getattr(datasets.Dataset, reader)(files, **settings)  # `load_dataset` would count it on the network
    except Exception as error:  # of any format's reader
        cause = error.__cause__ or error
        raise OptionError(f"{option} {', '.join(files)}: cannot be read: {one_line(cause, 300)}") from error


def _as_text(datasets: Any, file: str, delimiter: str) -> dict[str, Any]:
    """TrainSettings by which every cell of a table is the text that it is: 007, NA and 1.50 are answers too."""
    import pandas as pd  # type: ignore[import-untyped]  # datasets requires it

    names = pd.read_csv(file, sep=delimiter, nrows=0).columns
    return {"features": datasets.Features(dict.fromkeys(names, datasets.Value("string"))), "keep_default_na": False}


def _hub_rows(datasets: Any, name: str, option: str) -> Dataset:
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise OptionError(f"{option} {name}: no such file, and no data set on the Hub (OWNER/NAME[:CONFIG][@SPLIT])")
    with explain_data(match["name"], f"{option} {name}"):
        return datasets.load_dataset(match["name"], match["config"], split=match["split"] or "train")


def find_columns(
    rows: Dataset, roles: Mapping[str, Sequence[str]], chosen: Mapping[str, str], optional: Sequence[str] = ()
) -> dict[str, str]:
    """The column of each role: the one that was chosen, or else the first of its usual names that is there.

    Raises OptionError where a role has none, and for a chosen one that is not there.
    """
    found = {}
    for role, usual in roles.items():
        if role in chosen:
            if chosen[role] not in rows.column_names:
                raise OptionError(f"--column {role}={chosen[role]}: the data has no such column ({_columns(rows)})")
            found[role] = chosen[role]
            continue
        named = [name for name in usual if name in rows.column_names]
        if named:
            found[role] = named[0]
        elif role not in optional:
            raise OptionError(
                f"the data has no column for the {role} (looked for: {', '.join(usual)}; {_columns(rows)}): "
                f"name it with --column {role}=NAME"
            )
    return found


def _columns(rows: Dataset) -> str:
    return f"columns: {', '.join(rows.column_names)}"


def text_of(row: Mapping[str, Any], column: str) -> str:
    """A row's text. Raises OptionError where it holds none."""
    value = row[column]
    if not isinstance(value, str):
        raise OptionError(f"column {column!r} of the data holds {value!r:.80} where a text was expected")
    return value


def number_of(value: Any) -> Any:
    """The number that a text says, as a cell of a table; anything else as it is."""
    try:
        found = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return value
    return found if math.isfinite(found) else value


def hold_out(examples: Dataset, seed: int, *, shuffle: bool) -> tuple[Dataset, Dataset | None]:
    """What to train on and a slice to evaluate on: a twentieth, 500 examples at most; the last ones, or any."""
    count = min(max(len(examples) // _HELD_OUT, 1), _MOST_HELD_OUT)
    if len(examples) < 2:
        return examples, None
    parts = examples.train_test_split(count, seed=seed, shuffle=shuffle)
    return parts["train"], parts["test"]
