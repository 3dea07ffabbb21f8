"""The zoo: recipes for well-known models, each in a TOML file in `model_zoo/`, and the configs that give their sizes.

A recipe has `model`, an id on the Hub, and settings with the names of `QuantizeSettings`. `model_zoo/configs/` has a
shortened `config.json` of each model, with the entries that its sizes depend on, so that a recipe can be planned
without the Hub.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq.display import size
from loftq.errors import OptionError, UnknownNameError
from loftq.formats.checkpoint import SINGLE, Checkpoint, TensorSpec, dtype_of
from loftq.formats.model_config import read_config
from loftq.models.tasks import build_meta
from loftq.planning.settings import TOKENS, QuantizeSettings, RunSettings
from loftq.settings import declared, from_dict, split

if TYPE_CHECKING:  # the list of recipes needs none of it, and torch takes a second
    from loftq.hub.source import Source
    from loftq.planning.footprint import Footprint
    from loftq.planning.plan import Plan
    from loftq.planning.recipe import Recipe
    from loftq.solving.report import Report

_README = """# The zoo

Each file here is a recipe. `loftq zoo build NAME` builds its artifact, `loftq zoo show NAME` shows the plan without
building it. `loftq zoo build` also takes the options of `loftq quantize` that say where and how to run. Artifacts are
written to `model_zoo/loftq/`, which git ignores.

{rows}

The sizes are computed from the shapes of the models, without their weights. “On disk” is the size of the backbone and
its adapter. “To load” is the memory for both, with the largest weight dequantized. “To train” is the peak memory of a
training step on one sequence of {tokens} tokens, with gradient checkpointing and Adam, as `loftq.load_qlora` prepares
it. The runtime of the device needs additional memory.

A recipe has `model`, and settings with the names that `loftq.quantize` uses. `configs/` has the entries of each
model's `config.json` that its sizes depend on. `default.toml` is the recipe of the model that `loftq quantize` uses by
default. `make zoo` writes this page.
"""
# The options of `loftq train` with which its dry run estimates the same step.
TRAINED_WITH = f"--batch-size 1 --cutoff-len {TOKENS} --gradient-checkpointing --optim adamw_torch"
_SETTINGS = declared(QuantizeSettings)
SIZES = "sizes.json"  # the rows of `table`, so that a list of them needs no plans
_PACKAGE = "package"  # the table about the package that ships the default model; the hub's `source` reads it


@dataclass(frozen=True)
class Entry:
    """A recipe of the zoo: its name, the text of its file, the id of the model, and the settings in the file.

    `shipped` is true for the default model, which comes in a package.
    """

    name: str
    text: str
    model: str
    settings: Mapping[str, Any]
    shipped: bool = False

    @property
    def recipe(self) -> Recipe:
        """The recipe with all settings, including defaults."""
        from loftq.planning.recipe import recipe_of

        return recipe_of(**self.settings)

    @cached_property
    def plan(self) -> Plan:
        """The plan of building it, made from the config alone, without the Hub and without weights."""
        from loftq.planning.planner import make_plan

        return make_plan(_source(self.model), self.recipe)

    @property
    def footprint(self) -> Footprint:
        """The size of its artifact on disk and in memory."""
        from loftq.planning.footprint import footprint

        return footprint(self.plan)


@cache
def zoo() -> Mapping[str, Entry]:
    """The recipes by name. Raises OptionError for a file that is not a valid recipe."""
    files = sorted(path for path in _folder().iterdir() if path.suffix == ".toml")
    return {path.stem: read_entry(path.stem, path.read_text(encoding="utf-8")) for path in files}


def find_recipe(name: str) -> Entry:
    """A recipe by its name. Raises UnknownNameError."""
    if name not in zoo():
        raise UnknownNameError("recipe", name, zoo())
    return zoo()[name]


def build_recipe(name: str, **options: Any) -> Report:
    """Build the artifact of a recipe. `options` are the keywords of `quantize` that say where and how to run.

    With `dry_run` the plan is made from the config that is shipped with the recipe, without the Hub.
    """
    entry = find_recipe(name)
    from loftq.planning.recipe import recipe_of
    from loftq.verbs.quantize import planned, quantize  # takes seconds: a wrong name is refused first

    if options.get("dry_run"):
        settings, run_settings = split({**entry.settings, **options}, QuantizeSettings, RunSettings)
        return planned(_source(entry.model), recipe_of(**settings), from_dict(RunSettings, run_settings))
    return quantize(None if entry.shipped else entry.model, **{**entry.settings, **options})


def read_entry(name: str, text: str) -> Entry:
    """A recipe from the text of its file. Raises OptionError if it is not valid."""
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise OptionError(f"{name}.toml is not valid TOML: {error}") from error
    shipped = values.pop(_PACKAGE, None) is not None
    model = values.pop("model", None)
    if not isinstance(model, str):
        raise OptionError(f'{name}.toml names no model: expected a line like model = "meta-llama/Llama-2-7b-hf"')
    for setting in values:
        if setting not in _SETTINGS:
            raise UnknownNameError(f"setting in {name}.toml", setting, _SETTINGS)
    settings = {key: tuple(item) if isinstance(item, list) else item for key, item in values.items()}
    return Entry(name, text, model, settings, shipped)


def recipe_names() -> list[str]:
    """The names of all recipes. No file is read."""
    return sorted(path.stem for path in _folder().iterdir() if path.suffix == ".toml")


def table() -> list[dict[str, Any]]:
    """A row for each recipe: sizes in bytes. Each recipe is planned."""
    return [_row(entry) for entry in zoo().values()]


def listed() -> list[dict[str, Any]]:
    """The rows of `table` as they were shipped. A recipe or config that has changed since is planned."""
    path = _folder() / SIZES
    shipped = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows = []
    for entry in zoo().values():
        known = shipped.get(entry.name, {})
        rows.append(known["row"] if known.get("of") == _hash(entry) else _row(entry))
    return rows


def sizes() -> str:
    """The text of `model_zoo/sizes.json`: each row with the hash of the files that it was computed from."""
    known = {entry.name: {"of": _hash(entry), "row": _row(entry)} for entry in zoo().values()}
    return json.dumps(known, indent=1) + "\n"


def _row(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "model": entry.model,
        "bits": entry.recipe.bits,
        "rank": entry.recipe.rank,
        **dataclasses.asdict(entry.footprint),
    }


def _hash(entry: Entry) -> str:
    config = _config_folder(entry.model) / "config.json"
    return hashlib.sha256(entry.text.encode() + (config.read_bytes() if config.is_file() else b"")).hexdigest()


def markdown() -> str:
    """The text of `model_zoo/README.md`."""
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


def _config_folder(model: str) -> Path:
    return _folder() / "configs" / model.rpartition("/")[2]


@cache
def _source(model: str) -> Source:
    folder = _config_folder(model)
    if not (folder / "config.json").is_file():
        raise OptionError(f"{folder} has no config.json, without which {model} cannot be planned: add one")
    return config_source(model, folder)


def config_source(model: str, folder: Path) -> Source:
    """A source that has only a `config.json`. Its tensors are those of the model that transformers builds from it."""
    from loftq.hub.source import Source

    built: Any = build_meta(folder)[0]
    dtype = dtype_of(read_config(folder))
    tied = built.all_tied_weights_keys
    tensors = {
        name: TensorSpec(name, dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
        for name, tensor in built.state_dict().items()
        if name not in tied
    }
    return Source(model, folder, Checkpoint(folder, tensors, dict.fromkeys(tensors, SINGLE)))
