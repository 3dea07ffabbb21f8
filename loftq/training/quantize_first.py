"""A full-precision model is quantized before an adapter trains on it, once for each way to quantize it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from loftq.artifacts.staging import is_begun
from loftq.errors import OutputError
from loftq.formats.artifact import MANIFEST, Artifact, open_artifact, read_artifact
from loftq.hub.source import Source
from loftq.planning.planner import make_plan
from loftq.planning.recipe import recipe_of
from loftq.planning.settings import SAVE_DIR, QuantizeSettings
from loftq.solving.finished import differences
from loftq.training.model import Model
from loftq.training.opening import check_artifact, quantizing_of
from loftq.training.settings import QUANTIZING, TrainSettings
from loftq.verbs.quantize import quantize

_NAMED = ("bits", "rank", "adapter", "num_labels", "task")  # by the folder's name, the task by its labels


def quantized(settings: TrainSettings, found: Model, *, quiet: bool) -> tuple[TrainSettings, Model]:
    """The settings and the model, full precision quantized: now, or by an earlier run, which may have been cut off.

    Nothing is done for an adapter on full precision. Raises OptionError where what was said of quantizing does not fit,
    OutputError where the model has changed since it was quantized.
    """
    if isinstance(found, Artifact):
        check_artifact(settings, found)
    if not isinstance(found, Source) or settings.adapter == "lora":
        return settings, found
    options = quantizing_of(settings, found)
    folder = _folder(found, options)
    try:
        quantize(settings.model, output=folder, resume=True, quiet=quiet, **options)
    except OutputError as error:
        if not is_begun(folder):
            raise
        raise OutputError(f"{error} (options of `loftq quantize`: removing {folder} does the same)") from error
    unsaid: dict[str, Any] = dict.fromkeys(QUANTIZING)
    return replace(settings, model=str(folder), **unsaid), open_artifact(folder)


def _folder(source: Source, options: dict[str, Any]) -> Path:
    """The one that `loftq quantize` would choose; with a digest where that name is another's, or does not say all."""
    bits, rank = (options.get(name, getattr(QuantizeSettings, name)) for name in ("bits", "rank"))
    name = f"{source.label}-{bits:g}bit-{rank}rank"
    labels = [f"{options['num_labels']}labels"] if "num_labels" in options else []
    folder = Path(SAVE_DIR) / "-".join([name, *(["qalora"] if options["adapter"] == "qalora" else []), *labels])
    if set(options) <= set(_NAMED) and not _is_anothers(folder, source, options):
        return folder
    told = json.dumps([source.name, source.revision, options], sort_keys=True)
    return folder.with_name(f"{folder.name}-{hashlib.sha256(told.encode()).hexdigest()[:8]}")


def _is_anothers(folder: Path, source: Source, options: dict[str, Any]) -> bool:
    """Whether another model, or another quantization of this one, lies there."""
    if not (folder / MANIFEST).is_file():
        return False
    return bool(differences(read_artifact(folder).manifest, make_plan(source, recipe_of(**options))))
