"""Quantizes a full-precision model before an adapter trains on it, once for each set of quantization settings."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from loftq.artifacts.staging import is_begun
from loftq.errors import OptionError, OutputError
from loftq.formats.artifact import MANIFEST, Artifact, open_artifact, read_artifact
from loftq.formats.schema import json_text
from loftq.hub.source import Source
from loftq.models.expert_offload import refusal
from loftq.planning.old_start import adopting, find_old_start
from loftq.planning.planner import make_plan
from loftq.planning.recipe import recipe_of
from loftq.planning.settings import SAVE_DIR, QuantizeSettings
from loftq.settings import from_dict
from loftq.solving.finished import differences
from loftq.training.model import Model
from loftq.training.open_model import check_artifact, quantizing_of
from loftq.training.settings import QUANTIZING, TrainSettings
from loftq.verbs.quantize import quantize

# Settings that the name of a folder shows; the number of labels also shows the task.
_NAMED = ("bits", "rank", "adapter", "num_labels", "task")


def quantized(settings: TrainSettings, backbone: Model, *, quiet: bool) -> tuple[TrainSettings, Model]:
    """Quantize a full-precision model, unless an earlier run did, and return the settings and the model to train on.

    A quantization that an earlier run began is finished. An artifact, and a model for a plain LoRA, stay as they are.
    Raises OptionError if the settings contradict an artifact, or need quantized experts that the model will not have,
    and OutputError if the model has changed since it was quantized.
    """
    if isinstance(backbone, Artifact):
        check_artifact(settings, backbone)
    if not isinstance(backbone, Source) or settings.adapter == "lora":
        return settings, backbone
    options = quantizing_of(settings, backbone)
    old = find_old_start(backbone)
    if old is not None:
        adopting(old, from_dict(QuantizeSettings, options))  # which refuses what contradicts the folder
        options = old.settings() | options
    if settings.offload is not None and not make_plan(backbone, recipe_of(**options)).stacks:
        raise OptionError(refusal(settings.model))
    folder = _folder(backbone, options)
    try:
        quantize(settings.model, output=folder, resume=True, quiet=quiet, **options)
    except OutputError as error:
        if not is_begun(folder):
            raise
        raise OutputError(f"{error} (these are options of `loftq quantize`; you can also remove {folder})") from error
    unset: dict[str, Any] = dict.fromkeys(QUANTIZING)
    return replace(settings, model=str(folder), **unset), open_artifact(folder)


def _folder(source: Source, options: dict[str, Any]) -> Path:
    """Choose the folder for the artifact, as `loftq quantize` does.

    A digest follows its name if another artifact has that name, or if the name does not show all settings.
    """
    bits, rank = (options.get(name, getattr(QuantizeSettings, name)) for name in ("bits", "rank"))
    name = f"{source.label}-{bits:g}bit-{rank}rank"
    labels = [f"{options['num_labels']}labels"] if "num_labels" in options else []
    folder = Path(SAVE_DIR) / "-".join([name, *(["qalora"] if options["adapter"] == "qalora" else []), *labels])
    if set(options) <= set(_NAMED) and not _is_in_use(folder, source, options):
        return folder
    identity = json_text([source.name, source.revision, options], sort_keys=True)
    return folder.with_name(f"{folder.name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}")


def _is_in_use(folder: Path, source: Source, options: dict[str, Any]) -> bool:
    """Whether the folder holds another model, or this model with another quantization."""
    if not (folder / MANIFEST).is_file():
        return False
    return bool(differences(read_artifact(folder).manifest, make_plan(source, recipe_of(**options))))
