"""The lengths of encoded examples, in tokens."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from loftq.training.encoding import IGNORED, Encoder
from loftq.training.settings import TrainSettings
from loftq.training.tasks import TRAINING_TASKS

if TYPE_CHECKING:
    from datasets import Dataset

_WHOLE = 1 << 30  # tokens: more than any example has
_SAMPLE = 2_000  # number of rows that are encoded a second time, without limits
_ROWS_AT_ONCE = 1_000


@dataclass(frozen=True)
class Lengths:
    """Lengths of examples in tokens, as they are before any is cut off. `cut_off` is the part that is longer.

    `limit` is the length to which they are cut. They were measured on `measured` examples.
    """

    mean: float
    most_of_95: int  # 95 % of the examples are at most so long
    longest: int
    limit: int
    cut_off: float
    measured: int

    def __str__(self) -> str:
        return (
            f"mean {self.mean:,.0f} tokens, 95 % have at most {self.most_of_95:,}, the longest has {self.longest:,}; "
            f"{f'{self.cut_off:.1%} are' if self.cut_off else 'none is'} cut off at {self.limit:,}"
        )


def sizes(examples: Dataset, column: str = "input_ids") -> np.ndarray:
    """The number of tokens in each example: int64 (examples,)."""
    import pyarrow.compute as pc  # type: ignore[import-untyped]  # datasets requires it

    parts = [
        np.asarray(pc.list_value_length(batch[column]), dtype=np.int64)
        for batch in examples.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def longest_of(examples: Dataset, encoder: Encoder) -> int:
    """The largest number of tokens of a text that the model reads or writes at once."""
    columns = ("input_ids", "labels") if encoder.seq2seq else ("input_ids",)
    return int(max(sizes(examples, column).max() for column in columns))


def measure_lengths(rows: Dataset, settings: TrainSettings, encoder: Encoder, encoded: Dataset) -> Lengths:
    """Measure examples as they are before they are cut off: all of them, or some of many, at even distances."""
    limit = encoder.cutoff_len
    if settings.task == "clm":  # blocks that fill the limit; nothing is cut off but the last tokens
        found = sizes(encoded)
        return _summary(found, limit, np.zeros(len(found), dtype=bool))
    step = max(len(rows) // _SAMPLE, 1)
    some = rows.select(range(0, len(rows), step)) if step > 1 else rows
    whole = replace(encoder, cutoff_len=_WHOLE, max_source_length=None, max_target_length=None)
    with redirect_stderr(io.StringIO()):  # its lines and bars are those of the examples that are encoded already
        found = TRAINING_TASKS[settings.task].encode(some, settings.columns, whole)
    inputs = sizes(found)
    if encoder.seq2seq:
        targets = sizes(found, "labels")
        cut = (inputs > (settings.max_source_length or limit)) | (targets > (settings.max_target_length or limit))
        return _summary(np.maximum(inputs, targets), limit, cut)
    cut = inputs > limit
    if settings.max_source_length is not None or settings.max_target_length is not None:
        learned = np.array([sum(label != IGNORED for label in labels) for labels in found["labels"]])
        cut = cut | (learned > (settings.max_target_length or limit))
        cut = cut | (inputs - learned > (settings.max_source_length or limit))
    return _summary(inputs, limit, cut)


def padded_tokens(lengths: np.ndarray, batch: int, seed: int) -> float:
    """The mean number of tokens in a batch of random examples, each padded to the longest of its batch."""
    order = np.random.default_rng(seed).permutation(lengths)
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    return float(np.mean([int(part.max()) * len(part) for part in batches]))


def _summary(found: np.ndarray, limit: int, cut: np.ndarray) -> Lengths:
    most = int(np.quantile(found, 0.95, method="higher"))
    return Lengths(float(found.mean()), most, int(found.max()), limit, float(cut.mean()), len(found))


def shown_example(example: dict[str, Any], encoder: Encoder) -> str:
    """An example as text, with the part that is learned between ⟦ and ⟧, and a label after the text."""
    ids, labels = list(example["input_ids"]), example["labels"]
    tokenizer = encoder.tokenizer
    if not isinstance(labels, list) or any(isinstance(label, float) for label in labels) or len(labels) == 0:
        return f"{_short(tokenizer.decode(ids))}\nlabel ⟦{labels}⟧"
    if encoder.seq2seq:
        target = tokenizer.decode([label for label in labels if label != IGNORED])
        return f"{_short(tokenizer.decode(ids))}\n⟦{_short(target)}⟧"
    learned = [label != IGNORED for label in labels]
    borders = [0, *(at for at in range(1, len(ids)) if learned[at] != learned[at - 1]), len(ids)]
    text, before = "", ""
    for start, end in pairwise(borders):
        until = tokenizer.decode(ids[:end])  # as a whole, because a character may have several tokens
        piece, before = _short(until[len(before) :]), until
        text += f"⟦{piece}⟧" if learned[start] else piece
    return text


def _short(text: str, most: int = 800) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"
