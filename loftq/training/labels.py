"""The labels that a classifier learns: a class, several classes at once, a number, or several numbers.

The problem type of a classifier's config decides which, and with it the loss that transformers computes. Without one,
transformers learns a number if there is a single label; otherwise a class from labels that are whole numbers, and
several classes at once from labels that are lists.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any

from loftq.errors import OptionError

NUMBERS, ONE_CLASS, SEVERAL_CLASSES = PROBLEMS = (
    "regression",
    "single_label_classification",
    "multi_label_classification",
)
_PLACEHOLDER = re.compile(r"LABEL_\d+")  # the name that transformers gives to a label without a name

Label = float | int | list[float]


@dataclass(frozen=True)
class Labels:
    """The labels of a classifier: their number, their names, and the problem type of its config if that names one."""

    count: int = 2
    ids: Mapping[str, int] = field(default_factory=dict)  # by name
    problem: str | None = None

    @property
    def names(self) -> list[str]:
        """The names of the labels that have one of their own."""
        return [name for name in self.ids if not _PLACEHOLDER.fullmatch(name)]

    def problem_of(self, label: Any) -> str:
        """The problem type of rows whose first label is known. Raises OptionError for one that has no loss."""
        if self.problem is None:
            return NUMBERS if self.count == 1 else SEVERAL_CLASSES if isinstance(label, list) else ONE_CLASS
        if self.problem not in PROBLEMS:
            known = ", ".join(PROBLEMS)
            raise OptionError(f"the problem_type {self.problem!r:.80} in the model's config is unknown: use {known}")
        if self.problem == ONE_CLASS and self.count == 1:
            raise OptionError(
                f"the model's config has one label and the problem_type {ONE_CLASS}, so there is nothing to learn: "
                "quantize the model with the right --num-labels"
            )
        return self.problem

    def read(self, value: Any, problem: str) -> Label:
        """The label that the loss of a problem type takes. Raises OptionError for a value that is no such label."""
        if problem == NUMBERS:
            found = self._numbers(value)
        elif problem == ONE_CLASS:
            found = self._class(value)
        else:
            found = self._classes(value)
        if found is None:
            expected, hint = self._expected(problem), self._hint(value, problem)
            raise OptionError(f"holds {value!r:.80}, but {expected} was expected{hint}")
        return found

    def id_of(self, name: str) -> int | None:
        """The number of a label by its name; large and small letters may differ."""
        if name in self.ids:
            return self.ids[name]
        alike = [number for other, number in self.ids.items() if other.casefold() == name.casefold()]
        return alike[0] if len(alike) == 1 else None

    def _numbers(self, value: Any) -> Label | None:
        if self.count == 1:
            return _finite(value, texts=True)
        if not isinstance(value, list) or len(value) != self.count:
            return None
        numbers = [_finite(one) for one in value]
        return [one for one in numbers if one is not None] if None not in numbers else None

    def _class(self, value: Any) -> int | None:
        named = self.id_of(value) if isinstance(value, str) else None
        if named is not None:
            return named
        number = _finite(value, texts=True)
        return int(number) if number is not None and number.is_integer() and 0 <= number < self.count else None

    def _classes(self, value: Any) -> list[float] | None:
        if not isinstance(value, list):
            return None
        if self.names and all(isinstance(one, str) for one in value):
            chosen = {self.id_of(one) for one in value}
            return None if None in chosen else [float(at in chosen) for at in range(self.count)]
        if len(value) != self.count or not all(isinstance(one, int | float) and one in (0, 1) for one in value):
            return None
        return [float(one) for one in value]

    def _expected(self, problem: str) -> str:
        names = shorten(", ".join(self.names), 200, placeholder="…")
        if problem == NUMBERS:
            return "a number" if self.count == 1 else f"a list of {self.count} numbers"
        if problem == ONE_CLASS:
            return f"a whole number from 0 to {self.count - 1}" + (f" or a name ({names})" if names else "")
        return f"a list of {self.count} numbers that are 0 or 1" + (f", or a list of names ({names})," if names else "")

    def _hint(self, value: Any, problem: str) -> str:
        takes_lists = problem == SEVERAL_CLASSES or (problem == NUMBERS and self.count > 1)
        if self.problem is not None and isinstance(value, list) != takes_lists:
            return f", because the problem_type in the model's config is {problem}"
        if isinstance(value, list) and problem == ONE_CLASS:
            return f"; a list is a label if the problem_type in the model's config is {SEVERAL_CLASSES}"
        if isinstance(value, str) and problem == ONE_CLASS and not self.names and _finite(value, texts=True) is None:
            return "; the model's config has no names of labels (label2id)"
        return "; quantize the model with the right --num-labels" if _finite(value, texts=True) is not None else ""


def labels_of(config: Any) -> Labels:
    """The labels of a model, from its config."""
    ids = {str(name): int(number) for name, number in (getattr(config, "label2id", None) or {}).items()}
    return Labels(int(config.num_labels), ids, getattr(config, "problem_type", None))


def named_values(names: Sequence[str] | None, labels: Labels) -> list[str] | None:
    """The names of a column of classes if the model has labels of the same names, maybe in another order."""
    if names is None or not labels.names or any(labels.id_of(name) is None for name in names):
        return None
    return list(names)


def _finite(value: Any, *, texts: bool = False) -> float | None:
    """The value of a finite number, with `texts` also of a text such as the cell of a table; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str) if texts else (int, float)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
