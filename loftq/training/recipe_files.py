"""Reads recipe files: TOML, YAML or JSON files with the settings of a single run, or of several runs by name.

The keys are those of `TrainSettings`, with dashes or underscores, or those of other programs (`planning.synonyms`). In
a file of tables, each table holds a run. FinLoRA's `finetune_configs.json` gets the defaults of that program.
"""

from __future__ import annotations

import logging
import math
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from loftq.display import one_line
from loftq.errors import OptionError, UnknownNameError
from loftq.formats.artifact import MANIFEST
from loftq.formats.schema import parse_json
from loftq.planning.synonyms import translated

_log = logging.getLogger(__name__)
_DORA = "peft_use_dora"  # a key of FinLoRA; false means a plain LoRA
_FINLORA = ("base_model", "dataset_path", "lora_r", "quant_bits", "num_epochs", _DORA)  # keys by which it is known
_FINLORA_ALPHA = 16.0  # its lora_alpha where an entry has none; ours would be the rank
_FINLORA_FILE = "finetune_configs.json"  # its script reads it in the folder in which it runs
_TABLES = ("columns", "set")  # settings that are tables themselves
_LARGEST = 1_000_000  # bytes of a file
_MOST_VALUES = 100_000  # in a YAML file with all aliases written out
_MOST_BRACKETS = 1_000
_PATHS = ("data", "eval_data", "model", "calibration", "train", "evaluate")
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")


def read_recipe(path: str | Path, *words: str, own: Collection[str] = ()) -> dict[str, Any]:
    """Read the settings of a recipe, by their names in `TrainSettings`, or by those of the settings `own`.

    The last of `words` names a run in a file that holds several; a word before it names a model instead of the
    recipe's. A path that does not exist is also looked for beside the file. A run without an `output` gets a folder
    with the name of the run. Raises OptionError for a file that cannot be read or a run that the file does not hold.
    """
    path = Path(path).expanduser()
    content = _parse(path)
    entries = {key: value for key, value in content.items() if isinstance(value, Mapping) and key not in _TABLES}
    shared = {key: value for key, value in content.items() if key not in entries}
    arguments = list(words)
    name = ""
    if entries:
        if not arguments and len(entries) > 1:
            raise OptionError(f"--recipe {path} holds several runs: name one of {', '.join(sorted(entries))}")
        name = arguments.pop() if arguments else next(iter(entries))
        if name not in entries:
            raise UnknownNameError(f"run in {path}", name, entries)
    if len(arguments) > 1:
        raise OptionError(
            f"--recipe {path}: expected at most {'a model and a run' if entries else 'a model'} as arguments"
        )
    settings: dict[str, Any] = {"output": name} if name else {}
    values = {str(key).replace("-", "_"): value for key, value in {**shared, **entries.get(name, {})}.items()}
    if values.pop(_DORA, False):
        raise OptionError(
            f"--recipe {path}: {_DORA} is true: loftq trains LoRA and has no DoRA: choose a run without it"
        )
    translation, notes = translated(values, own)
    for note in notes:
        _log.info(note)
    settings |= translation
    for key in _PATHS:
        if key in settings:
            settings[key] = _located(settings[key], path.parent)
    settings |= {"model": arguments[0]} if arguments else {}
    if any(key in values for key in _FINLORA) and not (Path(str(settings.get("model"))) / MANIFEST).is_file():
        settings.setdefault("alpha", _FINLORA_ALPHA)  # a folder that is quantized already has its own
    return settings


def recipe_with(words: Sequence[str]) -> str | None:
    """FinLoRA's file in the working directory, if the only word is the name of a run in it and of no folder."""
    if len(words) != 1 or not Path(_FINLORA_FILE).is_file() or Path(words[0]).exists():
        return None
    return _FINLORA_FILE if isinstance(_parse(Path(_FINLORA_FILE)).get(words[0]), Mapping) else None


def laid_over(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Override the settings of a recipe with those that were given; tables are merged name by name."""
    tables = {
        name: {**recipe[name], **given[name]}
        for name in _TABLES
        if name in given and isinstance(recipe.get(name), Mapping)
    }
    return {**recipe, **given, **tables}


def _parse(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST:
            raise OptionError(f"--recipe {path}: has more than {_LARGEST // 10**6} MB: expected a file of settings")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--recipe {path}: cannot be read ({error})") from error
    suffix = path.suffix.lower()
    if suffix != ".json" and suffix not in _READERS:
        raise OptionError(f"--recipe {path}: expected a .toml, .yaml or .json file")
    try:
        if suffix == ".json":
            content = parse_json(text, f"--recipe {path}:", object, error=OptionError, advice="correct it")
        else:
            content = _READERS[suffix](text)
        _check_plain(content)
    except RecursionError as error:
        raise OptionError(
            f"--recipe {path}: has too many tables inside each other: expected names and values"
        ) from error
    except ValueError as error:
        raise OptionError(f"--recipe {path}: {one_line(error, 300)}") from error
    if not isinstance(content, dict):
        raise OptionError(f"--recipe {path}: expected a table of names and values")
    return {str(key): value for key, value in content.items()}


def _check_plain(value: Any, name: str = "") -> None:
    """Raise ValueError for a value that no setting has, such as a date, bytes, or a number that is not finite."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_plain(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for inner in value:
            _check_plain(inner, name)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} = {value}: expected a finite number")
    elif isinstance(value, str) and re.search(r"[\ud800-\udfff\0]", value):
        raise ValueError(f"{name} holds a character that is not valid in a text")
    elif not isinstance(value, (str, int, float, type(None))):
        kind = type(value).__name__
        raise ValueError(f"{name} is a {kind}, but a text, a number or a list was expected: put a text in quotes")


def _unique(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """A table of pairs. Raises ValueError for a name that occurs twice."""
    table: dict[Any, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"the name {name!r:.80} occurs twice: remove one of them")
        table[name] = value
    return table


def _yaml(text: str) -> Any:
    import yaml  # the Hub client requires it

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Reads 2e-4 as a number, as TOML and JSON do."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
    if text.count("[") + text.count("{") > _MOST_BRACKETS:  # the reader's time grows with the square of their depth
        raise ValueError(f"has more than {_MOST_BRACKETS:,} lists and tables: write less")
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node, {})
        return loader.construct_document(node)
    except yaml.YAMLError as error:  # its text may quote a line of the file, which may hold a password
        place = getattr(error, "problem_mark", None)
        line = f"line {place.line + 1}: " if place is not None else ""
        parts = [getattr(error, part, None) for part in ("context", "problem")]
        raise ValueError(f"{line}not YAML ({', '.join(filter(None, parts)) or type(error).__name__})") from error
    except (TypeError, AttributeError, KeyError, OverflowError) as error:  # from a tag that does not fit its value
        raise ValueError(f"not YAML ({error!r:.80})") from error


def _check_nodes(node: Any, sizes: dict[int, int | None]) -> int:
    """The number of values that a YAML node stands for, with each alias counted as all that it repeats.

    `sizes` holds it by the identity of each node, and None while the node is being counted. Raises ValueError for more
    than `_MOST_VALUES`, for a node inside itself, and for a name that occurs twice in a table.
    """
    if id(node) in sizes:
        size = sizes[id(node)]
        if size is None:
            raise ValueError(f"line {node.start_mark.line + 1}: an alias stands for a value that contains it")
        return size
    sizes[id(node)] = None
    total = 1
    if node.id == "mapping":
        _unique((key.value, None) for key, _ in node.value if key.id == "scalar")
        total += sum(_check_nodes(key, sizes) + _check_nodes(value, sizes) for key, value in node.value)
    elif node.id == "sequence":
        total += sum(_check_nodes(value, sizes) for value in node.value)
    if total > _MOST_VALUES:
        raise ValueError(f"aliases repeat their values until there are more than {_MOST_VALUES:,}: write less")
    sizes[id(node)] = total
    return total


_READERS: Mapping[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".yaml": _yaml, ".yml": _yaml}


def _located(value: Any, folder: Path) -> Any:
    """Resolve a path, or each path of a list: if it exists only beside the recipe, the folder is added."""
    if isinstance(value, list):
        return [_located(path, folder) for path in value]
    with suppress(OSError):  # the name of a data set may be too long for a file
        if isinstance(value, str) and (folder / value).exists() and not Path(value).exists():
            return str(folder / value)
    return value
