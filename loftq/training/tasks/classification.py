"""Labels, or numbers, for a text or a pair of texts, as GLUE has them."""

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
    """Examples of a text, or two, and a label: a number from 0, or with one label any number.

    Token types go with them where the model tells the texts of a pair apart.
    """
    found = find_columns(rows, ROLES, columns, optional=("pair",))
    pair = found.get("pair")

    def example(row: Mapping[str, Any]) -> dict[str, Any]:
        second = None if pair is None else text_of(row, pair)
        read = encoder.tokenizer(text_of(row, found["text"]), second, truncation=True, max_length=encoder.cutoff_len)
        tokens = {name: list(read[name]) for name in ("input_ids", "token_type_ids") if name in read}
        return {**tokens, "labels": _label(row[found["label"]], found["label"], encoder.labels)}

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
    raise OptionError(f"column {column!r} of the data holds {value!r:.80} where {expected} was expected{hint}")


def scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, F1 (of class 1 of two; the mean over more), Matthews' correlation; Pearson's of two numbers or more."""
    from scipy.stats import pearsonr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if logits.shape[-1] == 1:
        return {"pearson": float(pearsonr(logits[:, 0], labels).statistic)} if len(labels) > 1 else {}
    chosen = logits.argmax(-1)
    average = "binary" if logits.shape[-1] == 2 else "macro"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a class that a few examples do not hold: it counts as 0
        return {
            "accuracy": float(accuracy_score(labels, chosen)),
            "f1": float(f1_score(labels, chosen, average=average)),
            "matthews": float(matthews_corrcoef(labels, chosen)),
        }
