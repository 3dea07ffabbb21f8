"""Summaries of documents, by encoder-decoders as they are and by causal models after a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loftq.errors import OptionError
from loftq.training.data import find_columns, text_of
from loftq.training.encoding import Encoder
from loftq.training.tasks.language_modelling import encoded

if TYPE_CHECKING:
    from datasets import Dataset

ROLES = {
    "document": ("document", "article", "dialogue", "text", "source"),
    "summary": ("summary", "highlights", "target"),
}
MOST_TOKENS = 128  # of a summary, where nothing is said
_CUE = "\n\nSummary:"


def encode(rows: Dataset, columns: Mapping[str, str], encoder: Encoder) -> Dataset:
    """Examples of a document and its summary."""
    found = find_columns(rows, ROLES, columns)

    def example(row: Mapping[str, Any]) -> dict[str, list[int]]:
        document, summary = (text_of(row, found[role]) for role in ROLES)
        if encoder.seq2seq:
            return encoder.pair(document, summary)
        room = min(len(encoder.ids(f" {summary}")) + 1, encoder.max_target_length or encoder.cutoff_len)
        return encoder.pair(prompt(document, encoder, room), f" {summary}")

    return encoded(rows, example)


def prompt(document: str, encoder: Encoder, room: int) -> str:
    """What a model reads: the document, and for a causal one the cue, before which the document is cut to fit."""
    if encoder.seq2seq:
        return document
    limit = encoder.cutoff_len - min(room, encoder.cutoff_len // 2)
    most = min(encoder.max_source_length or limit, limit) - len(encoder.ids(_CUE)) - 2
    ids = encoder.ids(document)
    if len(ids) > most:
        document = str(encoder.tokenizer.decode(ids[: max(most, 0)]))
    return document + _CUE


def rouge(written: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, with stemming. Raises OptionError without the library."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise OptionError("ROUGE needs the rouge-score package: pip install 'loftq[train]'") from error
    names = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    scorer = RougeScorer(list(names), use_stemmer=True)
    found = [scorer.score(reference, summary) for summary, reference in zip(written, expected, strict=True)]
    return {shown: sum(score[name].fmeasure for score in found) / len(found) for name, shown in names.items()}
