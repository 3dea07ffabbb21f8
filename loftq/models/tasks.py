"""Tasks: which of transformers' classes a checkpoint is built as, and what peft calls it.

The class is the one that the checkpoint's own `architectures` names, or that of the task asked for. It is
built on the meta device, without memory, as transformers would build it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from loftq.display import one_line
from loftq.errors import OptionError, SourceError, UnknownNameError


@dataclass(frozen=True)
class Task:
    """One row: transformers' Auto class, peft's task type, and whether it ends in a head trained with the adapter."""

    name: str
    auto_class: str
    peft_type: str | None
    has_head: bool = False


TASKS = {
    task.name: task
    for task in (
        Task("causal-lm", "AutoModelForCausalLM", "CAUSAL_LM"),
        Task("seq2seq-lm", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
        Task("masked-lm", "AutoModelForMaskedLM", None),
        Task("sequence-classification", "AutoModelForSequenceClassification", "SEQ_CLS", has_head=True),
        Task("token-classification", "AutoModelForTokenClassification", "TOKEN_CLS", has_head=True),
        Task("question-answering", "AutoModelForQuestionAnswering", "QUESTION_ANS", has_head=True),
        Task("image-classification", "AutoModelForImageClassification", None, has_head=True),
        Task("feature-extraction", "AutoModel", "FEATURE_EXTRACTION"),
    )
}


def auto_class(task: Task) -> Any:
    """The class whose `from_pretrained` loads models of a task."""
    import transformers

    return getattr(transformers, task.auto_class)


def part_before_head(model: Any, task: Task) -> nn.Module:
    """What lies before a task's head, where there is one; the whole model otherwise."""
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
) -> tuple[nn.Module, Task]:
    """The model of a checkpoint folder, on the meta device, and its task.

    `num_labels` resizes a classifier. With `buffers`, those are real and on the CPU, as the model's own code computes
    them; `dtype` is that of the parameters, by default the config's. Raises SourceError for a model type that
    transformers does not know, for one that needs code of its own without `trust_remote_code`, and for an architecture
    that belongs to no task; OptionError for a task that the model type has no class for, and for labels where there is
    nothing to classify.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    if task is not None and task not in TASKS:
        raise UnknownNameError("task", task, TASKS)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        named = [str(name) for name in config.architectures or ()]
    except Exception as error:  # a config's own class may raise anything for values that make no sense
        raise SourceError(_config_problem(folder, error)) from error
    chosen = _choose(folder, config, named, task)
    if num_labels is not None:
        if not chosen.name.endswith("-classification"):
            raise OptionError(f"--num-labels {num_labels}: a {chosen.name} model has no labels")
        config.num_labels = num_labels
    given = {} if dtype is None else {"dtype": dtype}
    try:
        with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
            model = auto_class(chosen).from_config(config, trust_remote_code=trust_remote_code, **given)
    except Exception as error:  # so may a model's
        raise SourceError(_config_problem(folder, error)) from error
    return cast(nn.Module, model), chosen


def _choose(folder: Path, config: Any, named: list[str], wanted: str | None) -> Task:
    classes = {task.name: found for task in TASKS.values() if (found := _classes(task, config))}
    known = ", ".join(classes) or "none"
    if wanted is not None:
        if wanted not in classes:
            raise OptionError(f"--task {wanted}: model type {config.model_type} has no class for it (it has: {known})")
        return TASKS[wanted]
    for name, found in classes.items():
        if set(named) & set(found):
            return TASKS[name]
    if getattr(config, "auto_map", None) and classes:
        return TASKS[next(iter(classes))]
    raise SourceError(
        f"{folder} is a {config.model_type} model ({', '.join(named) or 'no architecture named'}), "
        f"of no task that is known by its architecture: choose one with --task (it has: {known})"
    )


def _classes(task: Task, config: Any) -> list[str]:
    """Names of the classes that a model type has for a task."""
    own = (getattr(config, "auto_map", None) or {}).get(task.auto_class)
    if own:
        return [str(own).rpartition(".")[2]]
    found = auto_class(task)._model_mapping.get(type(config), ())
    return [cls.__name__ for cls in (found if isinstance(found, (list, tuple)) else [found])]


def _config_problem(folder: Path, error: Exception) -> str:
    text = one_line(error)
    if "trust_remote_code" in text:
        return f"{folder} needs Python code of its own to load: read that code, then add --trust-remote-code"
    if "model type" in text or "model_type" in text:
        from transformers import __version__

        found = re.search(r"model type `?'?(\w+)", text)
        named = f"model type {found[1]!r}" if found else "model type"
        return f"{folder / 'config.json'}: transformers {__version__} does not know its {named}: upgrade transformers"
    return f"{folder / 'config.json'} describes no model that transformers can build: {text}"
