"""Recipe files: a training as TOML, YAML or JSON, one a file or several by name.

The keys are those of `TrainSettings`, with dashes or underscores. A file of tables holds a run in each. The keys of
FinLoRA's `finetune_configs.json` are read as they are.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loftq.display import one_line
from loftq.errors import OptionError, UnknownNameError

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
_DORA = "peft_use_dora"  # of FinLoRA's entries: false in the plain ones
_TABLES = ("columns", "set")  # of one run
_PATHS = ("data", "eval_data", "model")
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")


def read_recipe(path: str | Path, *words: str) -> dict[str, Any]:
    """The settings of a recipe, by their names in `TrainSettings`.

    `words` name the entry of a file that holds several, and before that a model other than the recipe's. A path that is
    not there is looked for beside the file. An entry without an `output` goes to a folder of its name. Raises
    OptionError for a file that cannot be read, or an entry that is not there.
    """
    path = Path(path).expanduser()
    content = _parse(path)
    entries = {key: value for key, value in content.items() if isinstance(value, Mapping) and key not in _TABLES}
    shared = {key: value for key, value in content.items() if key not in entries}
    named = list(words)
    name = None
    if entries:
        if not named and len(entries) > 1:
            raise OptionError(f"--recipe {path} holds several runs: name one of {', '.join(sorted(entries))}")
        name = named.pop() if named else next(iter(entries))
        if name not in entries:
            raise UnknownNameError(f"run in {path}", name, entries)
    if len(named) > 1:
        raise OptionError(
            f"--recipe {path}: expected {'a model and a run' if entries else 'a model'} at most beside it"
        )
    found: dict[str, Any] = {"output": name} if name else {}
    for key, value in {**shared, **(entries[name] if name else {})}.items():
        plain = str(key).replace("-", "_")
        found[ALIASES.get(plain, plain)] = value
    if found.pop(_DORA, False):
        raise OptionError(f"--recipe {path}: {_DORA} is true: loftq trains LoRA and has no DoRA; choose a plain entry")
    for key in _PATHS:
        if key in found:
            found[key] = _located(found[key], path.parent)
    return found | ({"model": named[0]} if named else {})


def laid_over(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's settings and those that go before them: of a table, name by name."""
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
            content = json.loads(text)
        elif suffix in (".yaml", ".yml"):
            content = _yaml(text)
        else:
            raise OptionError(f"--recipe {path}: expected a .toml, .yaml or .json file")
    except ValueError as error:
        raise OptionError(f"--recipe {path}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise OptionError(f"--recipe {path}: expected names and values")
    return {str(key): value for key, value in content.items()}


def _yaml(text: str) -> Any:
    import yaml  # the Hub client requires it

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Reads 2e-4 as the number that it is in TOML and JSON."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(error) from error


def _located(value: Any, folder: Path) -> Any:
    """A path, or several, as they are from here."""
    if isinstance(value, list):
        return [_located(one, folder) for one in value]
    if isinstance(value, str) and (folder / value).exists() and not Path(value).exists():
        return str(folder / value)
    return value
