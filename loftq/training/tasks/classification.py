"""Classification: labels, or numbers, for a text or a pair of texts, as in GLUE."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loftq.errors import OptionError
from loftq.training.data import find_columns, number_of, text_of
from loftq.training.encoding import Encoder

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

ROLES = {
    "text": ("text", "sentence", "sentence1", "premise", "question1", "question"),
    "pair": ("text_pair", "sentence2", "hypothesis", "question2"),
    "label": ("label", "labels", "score"),
}


def encode(rows: Dataset, columns: Mapping[str, str], encoder: Encoder) -> Dataset:
    """Encode examples of a text or a pair and a label: a class from 0, or any number if `encoder.labels` is 1.

    An example has token types if the model distinguishes the texts of a pair. Raises OptionError for an invalid label.
    """
    names = find_columns(rows, ROLES, columns, optional=("pair",))
    pair = names.get("pair")

    def example(row: Mapping[str, Any]) -> dict[str, Any]:
        second = None if pair is None else text_of(row, pair)
        encoding = encoder.tokens(text_of(row, names["text"]), second, truncation=True, max_length=encoder.cutoff_len)
        tokens = {name: list(encoding[name]) for name in ("input_ids", "token_type_ids") if name in encoding}
        return {**tokens, "labels": _label(row[names["label"]], names["label"], encoder.labels)}

    return rows.map(example, remove_columns=rows.column_names, load_from_cache_file=False, desc="tokenize")


def _label(value: Any, column: str, labels: int) -> float | int:
    value = number_of(value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if labels == 1 and number:
        return float(value)
    if labels > 1 and number and float(value).is_integer() and 0 <= value < labels:
        return int(value)
    expected = "a number" if labels == 1 else f"a whole number from 0 to {labels - 1}"
    hint = "" if labels == 1 or not number else "; quantize the model with the right --num-labels"
    raise OptionError(f"column {column!r} of the data holds {value!r:.80}, but {expected} was expected{hint}")


def scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Score logits (examples, classes) against labels (examples,).

    Classes have accuracy, F1 and Matthews' correlation; F1 is that of class 1 if there are two classes, otherwise the
    mean of all. Numbers, with logits (examples, 1), have Pearson's correlation if there are at least two.
    """
    from scipy.stats import pearsonr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if logits.shape[-1] == 1:
        return {"pearson": float(pearsonr(logits[:, 0], labels).statistic)} if len(labels) > 1 else {}
    chosen = logits.argmax(-1)
    average = "binary" if logits.shape[-1] == 2 else "macro"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of classes that no example has; their scores are 0
        return {
            "accuracy": float(accuracy_score(labels, chosen)),
            "f1": float(f1_score(labels, chosen, average=average)),
            "matthews": float(matthews_corrcoef(labels, chosen)),
        }
