"""Summarization of documents: encoder-decoders read the document, causal models read it with a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loftq.errors import OptionError
from loftq.hub.columns import find_columns, text_of
from loftq.training.answering import answers
from loftq.training.encoding import Encoder, check_text
from loftq.training.opened import Opened
from loftq.training.spans import beginning
from loftq.training.tasks.language_modelling import encoded
from loftq.training.tasks.task import GENERATORS, Measure, MeasureSettings, TrainingTask, encoder_of

if TYPE_CHECKING:
    from datasets import Dataset

ROLES = {
    "document": ("document", "article", "dialogue", "text", "source"),
    "summary": ("summary", "highlights", "target"),
}
MOST_TOKENS = 128  # default length of a summary
_CUE = "\n\nSummary:"


def encode(rows: Dataset, columns: Mapping[str, str], encoder: Encoder) -> Dataset:
    """Encode examples of a document and its summary."""
    names = find_columns(rows, ROLES, columns)

    def example(row: Mapping[str, Any]) -> dict[str, list[int]]:
        document, summary = (text_of(row, names[role]) for role in ROLES)
        if encoder.seq2seq:
            return encoder.pair(document, summary)
        room = min(len(encoder.ids(f" {summary}")) + 1, encoder.max_target_length or encoder.cutoff_len)
        return encoder.pair(prompt(document, encoder, room), f" {summary}")

    return encoded(rows, example)


def prompt(document: str, encoder: Encoder, room: int) -> str:
    """Return the text that a model reads. A causal model reads the document, cut to fit, and then `Summary:`."""
    if encoder.seq2seq:
        return document
    check_text(document)
    limit = encoder.cutoff_len - min(room, encoder.cutoff_len // 2)
    room_for_document = min(encoder.max_source_length or limit, limit) - len(encoder.ids(_CUE)) - 2
    return beginning(encoder.tokenizer, document, room_for_document) + _CUE


def rouge(written: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Return the mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, with stemming.

    Raises OptionError if the rouge-score package is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise OptionError("ROUGE needs the rouge-score package: pip install 'loftq[train]'") from error
    names = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    scorer = RougeScorer(list(names), use_stemmer=True)
    scores = [scorer.score(reference, summary) for summary, reference in zip(written, expected, strict=True)]
    return {shown: sum(score[name].fmeasure for score in scores) / len(scores) for name, shown in names.items()}


def measure(opened: Opened, rows: Any, settings: MeasureSettings) -> dict[str, float]:
    columns = find_columns(rows, ROLES, settings.columns)
    limit = settings.max_new_tokens or MOST_TOKENS
    encoder = encoder_of(settings, opened, limit)
    prompts = [encoder.prompt(prompt(text_of(row, columns["document"]), encoder, limit), limit) for row in rows]
    texts = answers(opened, prompts, limit, batch_size=settings.batch_size, quiet=settings.quiet, desc="summarization")
    return rouge(texts, [text_of(row, columns["summary"]) for row in rows]) | {"documents": len(rows)}


TASKS = {"summarization": TrainingTask("a summary of a document", GENERATORS, ROLES, encode)}
MEASURES = {
    "summarization": Measure("ROUGE-1, -2 and -L of greedy summaries", "summarization", measure, ("max_new_tokens",))
}
