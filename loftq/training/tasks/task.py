"""The rows of the tables of tasks: one that a model can learn, and one that a model is measured on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from loftq.hub.columns import find_columns
from loftq.models.tasks import CAUSAL
from loftq.models.tokenizers import embedding_rows
from loftq.training.encoding import Encoder
from loftq.training.labels import labels_of
from loftq.training.opened import Opened

if TYPE_CHECKING:
    from datasets import Dataset

CLASSIFIER = "sequence-classification"
GENERATORS = (*CAUSAL, "seq2seq-lm")


@dataclass(frozen=True)
class TrainingTask:
    """A row: the models that can learn it, the columns that it reads, and how rows become examples.

    `scores` scores logits against labels under a problem type, for tasks whose evaluation has more than a loss. `check`
    compares the examples to train on with those to evaluate on. `used` finds the columns that are read, where these
    are not all columns with the names of `roles`.
    """

    text: str
    models: tuple[str, ...]  # names in loftq.models.tasks.TASKS
    roles: Mapping[str, Sequence[str]]  # the role of a column, and its usual names
    encode: Callable[[Dataset, Mapping[str, str], Encoder], Dataset]
    shuffled: bool = True  # whether random examples are held out, or the last ones
    scores: Callable[[Any, Any, str | None], dict[str, float]] | None = None
    check: Callable[[Dataset, Dataset], None] | None = None
    used: Callable[[Dataset, Mapping[str, str]], list[str]] | None = None

    def used_columns(self, rows: Dataset, columns: Mapping[str, str]) -> list[str]:
        """The columns of the data that are read."""
        if self.used is not None:
            return self.used(rows, columns)
        return list(find_columns(rows, self.roles, columns, optional=tuple(self.roles)).values())


class MeasureSettings(Protocol):
    """What a measure reads of the settings of `loftq evaluate`."""

    @property
    def columns(self) -> Mapping[str, str]:
        """The columns of roles, as far as they were named."""

    @property
    def chat_template(self) -> bool | None:
        """Whether prompts are written with the chat template; None if the task decides."""

    @property
    def cutoff_len(self) -> int:
        """The most tokens of an example."""

    @property
    def batch_size(self) -> int:
        """Number of examples that are measured at a time."""

    @property
    def window(self) -> int | None:
        """Number of tokens in a window of perplexity."""

    @property
    def stride(self) -> int | None:
        """Number of tokens between the beginnings of two windows."""

    @property
    def max_windows(self) -> int | None:
        """The most windows of perplexity; None for all of the text."""

    @property
    def max_new_tokens(self) -> int | None:
        """The most tokens of an answer."""

    @property
    def quiet(self) -> bool:
        """Whether no progress bar is shown."""


@dataclass(frozen=True)
class Measure:
    """A row: help text, the training task whose models can do it, the function that measures, and its own options.

    `note` is for a table that compares several models. `joins_rows` means that all rows are measured as one text.
    """

    text: str
    like: str  # the name of a training task
    measure: Callable[[Opened, Any, MeasureSettings], dict[str, float]]
    options: tuple[str, ...] = ()
    note: str | None = None
    joins_rows: bool = False


def encoder_of(settings: MeasureSettings, opened: Opened, most_tokens: int | None = None) -> Encoder:
    """An encoder with the tokenizer of a model and the limits of the settings."""
    limit, labels = min(settings.cutoff_len, opened.longest), labels_of(opened.model.config)
    rows = embedding_rows(opened.model)
    return Encoder(opened.tokenizer, opened.task.name, limit, None, most_tokens, settings.chat_template, labels, rows)
