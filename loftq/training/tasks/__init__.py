"""The tasks that a model can learn: a row for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loftq.errors import OptionError
from loftq.training.tasks import classification, gsm8k, language_modelling, summarization

if TYPE_CHECKING:
    from datasets import Dataset

    from loftq.training.encoding import Encoder

CLASSIFIER = "sequence-classification"
_GENERATORS = ("causal-lm", "seq2seq-lm")


@dataclass(frozen=True)
class TrainingTask:
    """A row: the models that can learn it, the columns that it reads, and how rows become examples."""

    text: str
    models: tuple[str, ...]  # names in loftq.models.tasks.TASKS
    roles: Mapping[str, Sequence[str]]  # the role of a column, and its usual names
    encode: Callable[[Dataset, Mapping[str, str], Encoder], Dataset]
    shuffled: bool = True  # whether random examples are held out, or the last ones

    def require(self, name: str, model_task: str, model: str) -> None:
        """Raise OptionError if a model of another task cannot learn this one."""
        if model_task in self.models:
            return
        possible = [task for task, row in TRAINING_TASKS.items() if model_task in row.models]
        steps = [f"choose a task that it can do ({', '.join(possible)})"] if possible else []
        if self.models == (CLASSIFIER,):  # any model can get a classifier's head; other heads cannot be added
            steps.append(f"quantize the model with `loftq quantize --task {CLASSIFIER}`")
        raise OptionError(
            f"--task {name} needs a {' or '.join(self.models)} model, and {model} is a {model_task} model: "
            f"{', or '.join([*steps, 'name another model'])}"
        )


TRAINING_TASKS = {
    "clm": TrainingTask(
        "plain text, packed into blocks of --cutoff-len tokens",
        ("causal-lm",),
        language_modelling.TEXT,
        language_modelling.pack_blocks,
        shuffled=False,
    ),
    "sft": TrainingTask(
        "answers to prompts, or conversations; only answers add to the loss",
        _GENERATORS,
        language_modelling.ROLES,
        language_modelling.encode,
    ),
    "gsm8k": TrainingTask(
        "grade school mathematics: questions and answers; only answers add to the loss",
        _GENERATORS,
        gsm8k.ROLES,
        gsm8k.encode,
    ),
    "classification": TrainingTask(
        "a label, or with --num-labels 1 a number, for a text or a pair of texts",
        (CLASSIFIER,),
        classification.ROLES,
        classification.encode,
    ),
    "summarization": TrainingTask("a summary of a document", _GENERATORS, summarization.ROLES, summarization.encode),
}
