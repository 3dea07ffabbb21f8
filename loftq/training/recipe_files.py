"""Reads recipe files: TOML, YAML or JSON files with the settings of a single run, or of several runs by name.

The keys are those of `TrainSettings`, with dashes or underscores. In a file of tables, each table holds a run. The keys
of FinLoRA's `finetune_configs.json` are understood too.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loftq.display import one_line
from loftq.errors import OptionError, UnknownNameError
from loftq.formats.schema import parse_json

ALIASES = {
    "base_model": "model",
    "dataset_path": "data",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "quant_bits": "bits",
    "num_epochs": "epochs",
    "gradient_accumulation_steps": "gradient_accumulation",
}
_DORA = "peft_use_dora"  # a key of FinLoRA; false means a plain LoRA
_TABLES = ("columns", "set")  # settings that are tables themselves
_PATHS = ("data", "eval_data", "model")
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")


def read_recipe(path: str | Path, *words: str) -> dict[str, Any]:
    """Read the settings of a recipe, by their names in `TrainSettings`.

    The last of `words` names a run in a file that holds several; a word before it names a model instead of the
    recipe's. A path that does not exist is also looked for beside the file. A run without an `output` gets a folder
    with the name of the run. Raises OptionError for a file that cannot be read or a run that the file does not hold.
    """
    path = Path(path).expanduser()
    content = _parse(path)
    entries = {key: value for key, value in content.items() if isinstance(value, Mapping) and key not in _TABLES}
    shared = {key: value for key, value in content.items() if key not in entries}
    arguments = list(words)
    name = None
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
    for key, value in {**shared, **(entries[name] if name else {})}.items():
        plain = str(key).replace("-", "_")
        settings[ALIASES.get(plain, plain)] = value
    if settings.pop(_DORA, False):
        raise OptionError(
            f"--recipe {path}: {_DORA} is true: loftq trains LoRA and has no DoRA: choose a run without it"
        )
    for key in _PATHS:
        if key in settings:
            settings[key] = _located(settings[key], path.parent)
    return settings | ({"model": arguments[0]} if arguments else {})


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
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--recipe {path}: cannot be read ({error})") from error
    suffix = path.suffix.lower()
    try:
        if suffix == ".toml":
            return tomllib.loads(text)
        if suffix == ".json":
            content = parse_json(text, f"--recipe {path}:", object, error=OptionError, advice="correct it")
        elif suffix in (".yaml", ".yml"):
            content = _yaml(text)
        else:
            raise OptionError(f"--recipe {path}: expected a .toml, .yaml or .json file")
    except (ValueError, RecursionError) as error:
        raise OptionError(f"--recipe {path}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise OptionError(f"--recipe {path}: expected a table of names and values")
    return {str(key): value for key, value in content.items()}


def _yaml(text: str) -> Any:
    import yaml  # the Hub client requires it

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Reads 2e-4 as a number, as TOML and JSON do."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(error) from error


def _located(value: Any, folder: Path) -> Any:
    """Resolve a path, or each path of a list: if it exists only beside the recipe, the folder is added."""
    if isinstance(value, list):
        return [_located(path, folder) for path in value]
    if isinstance(value, str) and (folder / value).exists() and not Path(value).exists():
        return str(folder / value)
    return value
