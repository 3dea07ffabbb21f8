"""Classification: labels, or numbers, for a text or a pair of texts, as in GLUE."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loftq.errors import OptionError
from loftq.hub.columns import find_columns, text_of
from loftq.training.collators import Collator
from loftq.training.encoding import Encoder
from loftq.training.labels import NUMBERS, named_values
from loftq.training.opened import Opened
from loftq.training.tasks.task import CLASSIFIER, Measure, MeasureSettings, TrainingTask, encoder_of

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

ROLES = {
    "text": ("text", "sentence", "sentence1", "premise", "question1", "question"),
    "pair": ("text_pair", "sentence2", "hypothesis", "question2"),
    "label": ("label", "labels", "score"),
}


def encode(rows: Dataset, columns: Mapping[str, str], encoder: Encoder) -> Dataset:
    """Encode examples of a text or a pair and a label: what the loss of the model's problem type takes.

    An example has token types if the model distinguishes the texts of a pair. Raises OptionError for an invalid label,
    with the number of its row.
    """
    names = find_columns(rows, ROLES, columns, optional=("pair",))
    pair, column = names.get("pair"), names["label"]
    problem = encoder.labels.problem_of(rows[0][column])
    classes = named_values(getattr(rows.features[column], "names", None), encoder.labels)

    def example(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        second = None if pair is None else text_of(row, pair)
        encoding = encoder.tokens(text_of(row, names["text"]), second, truncation=True, max_length=encoder.cutoff_len)
        tokens = {name: list(encoding[name]) for name in ("input_ids", "token_type_ids") if name in encoding}
        value = row[column]
        if classes is not None and isinstance(value, int) and 0 <= value < len(classes):
            value = classes[value]
        try:
            return {**tokens, "labels": encoder.labels.read(value, problem)}
        except OptionError as error:
            raise OptionError(f"row {index + 1}: column {column!r} of the data {error}") from error

    return rows.map(
        example, with_indices=True, remove_columns=rows.column_names, load_from_cache_file=False, desc="tokenize"
    )


def check_alike(learned: Dataset, evaluated: Dataset) -> None:
    """Raise OptionError if labels are lists in only one of two data sets, that to train on and that to evaluate on."""
    lists = [isinstance(examples[0]["labels"], list) for examples in (learned, evaluated)]
    if lists[0] != lists[1]:
        kinds = ["lists" if one else "single values" for one in lists]
        raise OptionError(f"the labels of --data are {kinds[0]}, but those of --eval-data are {kinds[1]}: correct them")


def scores(logits: np.ndarray, labels: np.ndarray, problem: str | None = None) -> dict[str, float]:
    """Score logits (examples, labels of the model) against labels (examples,), or (examples, labels) if they are lists.

    Classes have accuracy, F1 and Matthews' correlation; F1 is that of class 1 if there are two classes, otherwise the
    mean of all. Several classes at once have F1, the mean of all, and the accuracy of all labels of an example
    together. Numbers have Pearson's correlation, the mean of all, if there are at least two examples.
    """
    from scipy.stats import pearsonr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if labels.ndim == 2 and problem != NUMBERS:
        chosen = logits > 0
        f1 = f1_score(labels, chosen, average="macro", zero_division=0)
        return {"accuracy": float(accuracy_score(labels, chosen)), "f1": float(f1)}
    if logits.shape[-1] == 1 or problem == NUMBERS:
        columns = zip(logits.T, labels.reshape(len(labels), -1).T, strict=True)
        found = [float(pearsonr(*pair).statistic) for pair in columns if len(labels) > 1]
        return {"pearson": sum(found) / len(found)} if found else {}
    chosen = logits.argmax(-1)
    average = "binary" if logits.shape[-1] == 2 else "macro"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of classes that no example has; their scores are 0
        return {
            "accuracy": float(accuracy_score(labels, chosen)),
            "f1": float(f1_score(labels, chosen, average=average)),
            "matthews": float(matthews_corrcoef(labels, chosen)),
        }


def measure(opened: Opened, rows: Any, settings: MeasureSettings) -> dict[str, float]:
    import torch

    encoded = encode(rows, settings.columns, encoder_of(settings, opened))
    collator, examples = Collator(opened.tokenizer.pad_token_id), list(encoded)
    logits = []
    with torch.no_grad():
        for start in range(0, len(examples), settings.batch_size):
            batch = {
                name: tensor.to(opened.model.device)
                for name, tensor in collator(examples[start : start + settings.batch_size]).items()
            }
            batch.pop("labels")
            logits.append(opened.model(**batch).logits.float().cpu())
    labels = torch.tensor([example["labels"] for example in examples])
    problem = opened.model.config.problem_type
    return scores(torch.cat(logits).numpy(), labels.numpy(), problem) | {"examples": len(examples)}


TASKS = {
    "classification": TrainingTask(
        "a label, or with --num-labels 1 a number, for a text or a pair of texts",
        (CLASSIFIER,),
        ROLES,
        encode,
        scores=scores,
        check=check_alike,
    )
}
MEASURES = {
    "classification": Measure(
        "accuracy, F1 and Matthews' correlation of classes; Pearson's correlation of numbers",
        "classification",
        measure,
        note="A classifier head that was not trained answers at random.",
    )
}
