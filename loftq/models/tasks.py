"""Table of tasks: for each task the class of transformers that builds its models, and peft's name for it.

The class is the one that the checkpoint's own `architectures` names, or that of the task that the user names. The model
is built on the meta device, where it takes no memory, in the same way as transformers builds it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from loftq.display import one_line
from loftq.errors import ArtifactError, LoftQError, OptionError, SourceError, UnknownNameError
from loftq.formats.artifact import MANIFEST
from loftq.formats.model_config import read_config

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Task:
    """One row of the table.

    A row has transformers' Auto class, peft's task type, and whether models end in a head that is trained together with
    the adapter.
    """

    name: str
    auto_class: str
    peft_type: str | None
    has_head: bool = False


IMAGE_TEXT = "image-text-to-text"
CAUSAL = ("causal-lm", IMAGE_TEXT)  # tasks whose models predict the next token of a text
TASKS = {
    task.name: task
    for task in (
        Task("causal-lm", "AutoModelForCausalLM", "CAUSAL_LM"),
        Task(IMAGE_TEXT, "AutoModelForImageTextToText", "CAUSAL_LM"),
        Task("seq2seq-lm", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
        Task("speech-seq2seq", "AutoModelForSpeechSeq2Seq", None),  # peft's class of seq2seq models demands text
        Task("ctc", "AutoModelForCTC", None, has_head=True),
        Task("masked-lm", "AutoModelForMaskedLM", None),
        Task("sequence-classification", "AutoModelForSequenceClassification", "SEQ_CLS", has_head=True),
        Task("token-classification", "AutoModelForTokenClassification", "TOKEN_CLS", has_head=True),
        Task("question-answering", "AutoModelForQuestionAnswering", "QUESTION_ANS", has_head=True),
        Task("image-classification", "AutoModelForImageClassification", None, has_head=True),
        Task("feature-extraction", "AutoModel", "FEATURE_EXTRACTION"),
    )
}


def recorded_task(manifest: Mapping[str, Any], where: object = MANIFEST) -> Task:
    """The task that the manifest `where` names. Raises ArtifactError if this version does not know it."""
    name = manifest["source"]["task"]
    if name not in TASKS:
        raise ArtifactError(
            f"{where} names the task {name!r}, which this loftq does not know (known: {', '.join(TASKS)}): "
            "upgrade loftq, or copy or download the folder again"
        )
    return TASKS[name]


def auto_class(task: Task) -> Any:
    """The class of transformers whose `from_pretrained` loads models of a task."""
    import transformers

    return getattr(transformers, task.auto_class)


def peft_type(task: Task, model: nn.Module) -> str | None:
    """peft's name of a task, or None if its class for the task hands over inputs that a model does not take.

    peft's class for features names the inputs of text in each call. Models of images, and some of text, pass what they
    do not know on to modules that get it a second time.
    """
    takes = inspect.signature(model.forward).parameters
    fits = task.peft_type != "FEATURE_EXTRACTION" or {"input_ids", "attention_mask", "inputs_embeds"} <= set(takes)
    return task.peft_type if fits else None


def part_before_head(model: Any, task: Task) -> nn.Module:
    """The part of a model before the task's head, or the whole model if the task has no head."""
    prefix = str(getattr(model, "base_model_prefix", "")) if task.has_head else ""
    part: nn.Module = getattr(model, prefix) if prefix and hasattr(model, prefix) else model
    return part


def build_meta(
    folder: Path,
    *,
    task: str | None = None,
    num_labels: int | None = None,
    trust_remote_code: bool = False,
    buffers: bool = False,
    dtype: torch.dtype | None = None,
    tensors: int | None = None,
) -> tuple[nn.Module, Task]:
    """Build the model of a checkpoint folder on the meta device, and return it with its task.

    `num_labels` resizes a classifier. With `buffers`, the model's buffers are real tensors on the CPU, as the model's
    own code computes them. `dtype` is the dtype of the parameters, by default that of the config. `tensors` is the
    number of tensors in the checkpoint, if the folder does not hold them.

    Raises SourceError for a model type that transformers does not know, for one that needs code of its own if
    `trust_remote_code` is false, and for an architecture that belongs to no task. Raises OptionError for a task for
    which the model type has no class, and for `num_labels` if the task is not a classification.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    if task is not None and task not in TASKS:
        raise UnknownNameError("task", task, TASKS)
    read_config(folder, tensors=tensors)  # transformers would build a billion layers
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        architectures = [str(name) for name in config.architectures or ()]
        chosen = _choose(folder, config, architectures, task)
    except LoftQError:
        raise
    except Exception as error:  # for invalid values, the class of a config may raise any exception
        raise SourceError(_config_problem(folder, error)) from error
    if num_labels is not None:
        if not chosen.name.endswith("-classification"):
            raise OptionError(
                f"--num-labels {num_labels}: a {chosen.name} model has no labels: remove the option, or choose a "
                "classification task with --task"
            )
        if num_labels != config.num_labels:
            config.problem_type = None  # it was that of the old head
        config.num_labels = num_labels
    options = {} if dtype is None else {"dtype": dtype}
    try:
        with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
            model = auto_class(chosen).from_config(config, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # and so may the class of a model
        raise SourceError(_config_problem(folder, error)) from error
    return cast("nn.Module", model), chosen


def _choose(folder: Path, config: Any, architectures: list[str], wanted: str | None) -> Task:
    classes = {task.name: names for task in TASKS.values() if (names := _classes(task, config))}
    tasks = ", ".join(classes) or "none"
    if wanted is not None:
        if wanted not in classes:
            raise OptionError(
                f"--task {wanted}: transformers has no class of model type {config.model_type} for this task "
                f"(it has classes for: {tasks})"
            )
        return TASKS[wanted]
    own = _fitting(classes, config, architectures)
    if own is not None:
        return TASKS[own]
    if getattr(config, "auto_map", None) and classes:
        return TASKS[next(iter(classes))]
    raise SourceError(
        f"{folder} is a {config.model_type} model ({', '.join(architectures) or 'no architecture named'}), and its "
        f"architecture does not tell the task: choose one with --task (transformers has classes for: {tasks})"
    )


def own_task(folder: Path) -> str | None:
    """The task of the architecture that a checkpoint folder names; None if it names none that belongs to a task."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception:  # of a type that needs code of its own
        return None
    classes = {task.name: names for task in TASKS.values() if (names := _classes(task, config))}
    return _fitting(classes, config, [str(name) for name in config.architectures or ()])


def _fitting(classes: Mapping[str, list[str]], config: Any, architectures: list[str]) -> str | None:
    fitting = [task for task, names in classes.items() if set(architectures) & set(names)]
    if IMAGE_TEXT in fitting and getattr(config, "vision_config", None) is not None:
        return IMAGE_TEXT  # transformers loads some of these models as causal language models too
    return fitting[0] if fitting else None


def _classes(task: Task, config: Any) -> list[str]:
    """Names of the classes of transformers for a model type and a task."""
    own = (getattr(config, "auto_map", None) or {}).get(task.auto_class)
    if own:
        return [str(own).rpartition(".")[2]]
    classes = auto_class(task)._model_mapping.get(type(config), ())
    return [cls.__name__ for cls in (classes if isinstance(classes, (list, tuple)) else [classes])]


def _config_problem(folder: Path, error: Exception) -> str:
    text = one_line(error)
    if "trust_remote_code" in text:
        return f"{folder} needs Python code of its own to load: read that code, then add --trust-remote-code"
    if "model type" in text or "model_type" in text:
        from transformers import __version__

        match = re.search(r"model type `?'?(\w+)", text)
        kind = f"model type {match[1]!r}" if match else "model type"
        return f"{folder / 'config.json'}: transformers {__version__} does not know its {kind}: upgrade transformers"
    return f"transformers cannot build the model of {folder / 'config.json'}: {text or type(error).__name__}"
