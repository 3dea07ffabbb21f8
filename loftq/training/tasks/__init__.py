"""What can be learned and measured: one row a task."""

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
    models: tuple[str, ...]  # names of loftq.models.tasks.TASKS
    roles: Mapping[str, Sequence[str]]  # a column's role, and the names under which it is looked for
    encode: Callable[[Dataset, Mapping[str, str], Encoder], Dataset]
    shuffled: bool = True  # whether any examples may be held out, or the last ones

    def require(self, name: str, model_task: str, what: str) -> None:
        """Raises OptionError for a model whose class cannot do the task."""
        if model_task in self.models:
            return
        able = [task for task, row in TRAINING_TASKS.items() if model_task in row.models]
        steps = [f"choose one that it can do ({', '.join(able)})"] if able else []
        if self.models == (CLASSIFIER,):  # a head on any model; of the others each is what it was made as
            steps.append(f"quantize the model with `loftq quantize --task {CLASSIFIER}`")
        raise OptionError(
            f"--task {name} needs a {' or '.join(self.models)} model, and {what} is a {model_task} one: "
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
        "answers to prompts, or conversations: loss on the answers alone",
        _GENERATORS,
        language_modelling.ROLES,
        language_modelling.encode,
    ),
    "gsm8k": TrainingTask(
        "grade school mathematics: question and answer, loss on the answer", _GENERATORS, gsm8k.ROLES, gsm8k.encode
    ),
    "classification": TrainingTask(
        "a label, or with --num-labels 1 a number, for a text or two",
        (CLASSIFIER,),
        classification.ROLES,
        classification.encode,
    ),
    "summarization": TrainingTask("a summary of a document", _GENERATORS, summarization.ROLES, summarization.encode),
}
