"""The zoo: recipes for known models, one TOML file each in `model_zoo/`, with what their size can be told from.

A recipe is `model`, an id on the Hub, and settings by their names in `QuantizeSettings`. `model_zoo/configs/` has what
the sizes of each model depend on, its `config.json` in short, so that a recipe is planned without the Hub.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from loftq.display import size
from loftq.errors import OptionError, UnknownNameError
from loftq.formats.checkpoint import SINGLE, Checkpoint, TensorSpec, dtype_of
from loftq.hub.source import Source
from loftq.models.tasks import build_meta
from loftq.planning.footprint import TOKENS, Footprint, footprint
from loftq.planning.plan import Plan
from loftq.planning.planner import make_plan
from loftq.planning.recipe import Recipe, recipe_of
from loftq.planning.settings import QuantizeSettings
from loftq.settings import declared
from loftq.solving.report import Report
from loftq.verbs.quantize import quantize

_README = """# The zoo

Recipes, a file each. `loftq zoo build NAME` makes one, `loftq zoo show NAME` tells what that will be. All options of
`loftq quantize` that say where and how to run go with it. Results go to `model_zoo/loftq/`, which git ignores.

{rows}

Sizes are told from the models' shapes, without their weights: of the backbone and its adapter on disk; of both in
memory with the largest weight dequantized; and at the peak of a training step on one sequence of {tokens} tokens, with
gradient checkpointing and Adam, as `loftq.load_qlora` prepares it. What the device's runtime needs comes on top.

A recipe has `model`, and settings as `loftq.quantize` names them; `configs/` has what the sizes of each model depend
on. `default.toml` is the recipe of the model that `loftq quantize` takes when none is named. `make zoo` writes this
page.
"""
_SETTINGS = declared(QuantizeSettings)
_PACKAGE = "package"  # which ships the default model: a table that `source` reads


@dataclass(frozen=True)
class Entry:
    """A recipe of the zoo: its name, its file's text, the model's id, and the settings that the file gives.

    `shipped` is the default model's, which a package brings.
    """

    name: str
    text: str
    model: str
    settings: Mapping[str, Any]
    shipped: bool = False

    @property
    def recipe(self) -> Recipe:
        """All settings."""
        return recipe_of(**self.settings)

    @cached_property
    def plan(self) -> Plan:
        """What building it would make, told from the config alone: without the Hub, and for no weights."""
        return make_plan(_source(self.model), self.recipe)

    @property
    def footprint(self) -> Footprint:
        """How large it becomes, on disk and in memory."""
        return footprint(self.plan)


@cache
def zoo() -> Mapping[str, Entry]:
    """The recipes by name. Raises OptionError for a file that is none."""
    files = sorted(path for path in _folder().iterdir() if path.suffix == ".toml")
    return {path.stem: read_entry(path.stem, path.read_text(encoding="utf-8")) for path in files}


def find_recipe(name: str) -> Entry:
    """A recipe by its name. Raises UnknownNameError."""
    if name not in zoo():
        raise UnknownNameError("recipe", name, zoo())
    return zoo()[name]


def build_recipe(name: str, **options: Any) -> Report:
    """Make an artifact as a recipe says. `options` are those of `quantize` that change where and how it runs."""
    entry = find_recipe(name)
    return quantize(None if entry.shipped else entry.model, **{**entry.settings, **options})


def read_entry(name: str, text: str) -> Entry:
    """A recipe from its file's text. Raises OptionError where it is none."""
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{name}.toml is not TOML: {error}") from error
    shipped = found.pop(_PACKAGE, None) is not None
    model = found.pop("model", None)
    if not isinstance(model, str):
        raise OptionError(f'{name}.toml names no model: expected a line like model = "meta-llama/Llama-2-7b-hf"')
    for setting in found:
        if setting not in _SETTINGS:
            raise UnknownNameError(f"setting in {name}.toml", setting, _SETTINGS)
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    return Entry(name, text, model, settings, shipped)


def table() -> list[dict[str, Any]]:
    """A row for each recipe: sizes in bytes."""
    return [
        {
            "name": entry.name,
            "model": entry.model,
            "bits": entry.recipe.bits,
            "rank": entry.recipe.rank,
            **dataclasses.asdict(entry.footprint),
        }
        for entry in zoo().values()
    ]


def markdown() -> str:
    """`model_zoo/README.md`."""
    head = (
        "| recipe | model | bits | rank | on disk | to load | to train |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    rows = "\n".join(
        f"| `{row['name']}` | {row['model']} | {row['bits']:g} | {row['rank']} | {size(row['disk'])} | "
        f"{size(row['load'])} | {size(row['train'])} |"
        for row in table()
    )
    return _README.format(rows=f"{head}\n{rows}", tokens=f"{TOKENS:,}")


def _folder() -> Path:
    return Path(str(resources.files("loftq.model_zoo")))


@cache
def _source(model: str) -> Source:
    folder = _folder() / "configs" / model.rpartition("/")[2]
    if not (folder / "config.json").is_file():
        raise OptionError(f"{folder} has no config.json: without it {model} cannot be planned")
    return config_source(model, folder)


def config_source(model: str, folder: Path) -> Source:
    """A model of which only `config.json` is there: its tensors are those of the model that transformers builds."""
    built: Any = build_meta(folder)[0]
    dtype = dtype_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    tied = built.all_tied_weights_keys
    tensors = {
        name: TensorSpec(name, dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
        for name, tensor in built.state_dict().items()
        if name not in tied
    }
    return Source(model, folder, Checkpoint(folder, tensors, dict.fromkeys(tensors, SINGLE)))
