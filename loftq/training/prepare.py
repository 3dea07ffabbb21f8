"""Encodes the data before any weight is loaded: for a tokenizer and the sizes of a model, its configuration is enough.

So a column that is missing, or a row that cannot be used, is named at once, and not after a long quantization.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loftq.errors import OptionError
from loftq.formats.artifact import Artifact
from loftq.hub.images import folders_of
from loftq.models.tasks import IMAGE_TEXT, TASKS, build_meta
from loftq.models.tokenizers import embedding_rows
from loftq.training import tasks
from loftq.training.data import hold_out
from loftq.training.encoding import Encoder, load_tokenizer
from loftq.training.labels import labels_of
from loftq.training.model import Model
from loftq.training.open_model import check_artifact, check_foreign, quantizing_of
from loftq.training.opened import Opened
from loftq.training.packing import check_packable, pack_examples
from loftq.training.settings import TrainSettings
from loftq.training.tasks import TRAINING_TASKS


def prepare(settings: TrainSettings, backbone: Model) -> Opened:
    """The model that will be trained, without weights (on the meta device) and without its adapter, and its tokenizer.

    Raises OptionError for settings that contradict the backbone, and ArtifactError for one that cannot be trained.
    """
    model: Any
    if isinstance(backbone, Artifact):
        check_artifact(settings, backbone)
        recipe, name = backbone.manifest["recipe"], backbone.manifest["source"]["task"]
        model, task = build_meta(backbone.folder, task=name, num_labels=recipe["num_labels"])
        return Opened(model, load_tokenizer(backbone.folder, model), task, backbone.folder)
    if isinstance(backbone, Path):
        tasks.require(settings.task, "causal-lm", str(backbone))
        check_foreign(settings, backbone)
        model, task = build_meta(backbone, task="causal-lm")
        return Opened(model, load_tokenizer(backbone, model), TASKS["causal-lm"], backbone)
    options = quantizing_of(settings, backbone)
    tensors = len(backbone.checkpoint.tensors)
    model, task = build_meta(
        backbone.folder, task=options["task"], num_labels=options.get("num_labels"), tensors=tensors
    )
    return Opened(model, load_tokenizer(backbone.folder, model), task, backbone.folder)


def encoder_for(settings: TrainSettings, opened: Opened) -> Encoder:
    """The encoder of the examples of a training."""
    return Encoder(
        opened.tokenizer,
        opened.task.name,
        min(settings.cutoff_len, opened.longest),
        settings.max_source_length,
        settings.max_target_length,
        settings.chat_template,
        labels_of(opened.model.config),
        embedding_rows(opened.model),
        opened.folder if opened.task.name == IMAGE_TEXT else None,
        folders_of((*settings.data, *settings.eval_data)),
    )


def examples(settings: TrainSettings, opened: Opened, rows: Any, evaluation: Any) -> tuple[Any, Any]:
    """Encode the examples to train on, and those to evaluate on: from their own rows, or held out from the others.

    The second is None if there are too few rows to hold any out. Only those to train on are packed.
    """
    encoder = encoder_for(settings, opened)
    task = TRAINING_TASKS[settings.task]
    train_examples = task.encode(rows, settings.columns, encoder)
    if settings.packing:
        check_packable(train_examples, opened.model)
    if evaluation is None:
        train_examples, eval_examples = hold_out(train_examples, settings.seed, shuffle=task.shuffled)
    else:
        eval_examples = task.encode(evaluation, settings.columns, encoder)
        if task.check is not None:
            task.check(train_examples, eval_examples)
    return pack_examples(train_examples, encoder.cutoff_len) if settings.packing else train_examples, eval_examples


def check_push(settings: TrainSettings, backbone: Model) -> None:
    """Raise OptionError if the settings name a repository for a model that cannot be pushed."""
    if settings.push_to_hub is None or isinstance(backbone, Artifact):
        return
    if isinstance(backbone, Path) or settings.adapter == "lora":
        raise OptionError(
            f"--push-to-hub applies only to an artifact of loftq: leave it out, and push {settings.output} with "
            "`hf upload`"
        )
