"""The tasks of `loftq evaluate`: a row for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from loftq.models.tokenizers import embedding_rows
from loftq.training.data import find_columns, text_of
from loftq.training.encoding import Collator, Encoder
from loftq.training.evaluate_settings import EvaluateSettings
from loftq.training.generate import answers
from loftq.training.labels import labels_of
from loftq.training.open_model import Opened
from loftq.training.tasks import TRAINING_TASKS, classification, gsm8k, language_modelling, summarization
from loftq.training.tasks.perplexity import perplexity

_WINDOW = 1024  # tokens; less if the model's longest input is shorter


def _encoder(settings: EvaluateSettings, opened: Opened, most_tokens: int | None = None) -> Encoder:
    """An encoder with the tokenizer of a model and the limits of the settings."""
    limit, labels = min(settings.cutoff_len, opened.longest), labels_of(opened.model.config)
    rows = embedding_rows(opened.model)
    return Encoder(opened.tokenizer, opened.task.name, limit, None, most_tokens, settings.chat_template, labels, rows)


def _perplexity(opened: Opened, rows: Any, settings: EvaluateSettings) -> dict[str, float]:
    column = find_columns(rows, TRAINING_TASKS["clm"].roles, settings.columns)["text"]
    encoder = _encoder(settings, opened)
    ids = language_modelling.joined_ids((text_of(row, column) for row in rows), encoder)
    window = min(settings.window or _WINDOW, opened.longest)
    return perplexity(opened.model, ids, window, min(settings.stride or window, window), quiet=settings.quiet)


def _gsm8k(opened: Opened, rows: Any, settings: EvaluateSettings) -> dict[str, float]:
    columns = find_columns(rows, gsm8k.ROLES, settings.columns)
    expected = [gsm8k.reference(row, columns["answer"]) for row in rows]
    limit = settings.max_new_tokens or gsm8k.MOST_TOKENS
    encoder = _encoder(settings, opened)
    prompts = [gsm8k.prompt(text_of(row, columns["question"]), encoder, limit) for row in rows]
    ends = gsm8k.ends(encoder)
    texts = answers(
        opened, prompts, limit, batch_size=settings.batch_size, ends=ends, quiet=settings.quiet, desc="gsm8k"
    )
    right = [gsm8k.final_number(answer) == number for answer, number in zip(texts, expected, strict=True)]
    return {"exact match": sum(right) / len(right), "questions": len(right)}


def _summarization(opened: Opened, rows: Any, settings: EvaluateSettings) -> dict[str, float]:
    columns = find_columns(rows, summarization.ROLES, settings.columns)
    limit = settings.max_new_tokens or summarization.MOST_TOKENS
    encoder = _encoder(settings, opened, limit)
    prompts = [
        encoder.prompt(summarization.prompt(text_of(row, columns["document"]), encoder, limit), limit) for row in rows
    ]
    texts = answers(opened, prompts, limit, batch_size=settings.batch_size, quiet=settings.quiet, desc="summarization")
    return summarization.rouge(texts, [text_of(row, columns["summary"]) for row in rows]) | {"documents": len(rows)}


def _classification(opened: Opened, rows: Any, settings: EvaluateSettings) -> dict[str, float]:
    encoded = classification.encode(rows, settings.columns, _encoder(settings, opened))
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
    return classification.scores(torch.cat(logits).numpy(), labels.numpy(), problem) | {"examples": len(examples)}


@dataclass(frozen=True)
class Measure:
    """A row: help text, the training task whose models can do it, the function that measures, and its own options."""

    text: str
    like: str  # a name in TRAINING_TASKS
    measure: Callable[[Opened, Any, EvaluateSettings], dict[str, float]]
    options: tuple[str, ...] = ()


MEASURES = {
    "perplexity": Measure(
        "a causal model on text, in windows of --window tokens that begin --stride tokens apart",
        "clm",
        _perplexity,
        ("window", "stride"),
    ),
    "gsm8k": Measure(
        "greedy answers to GSM8K, exact match of the final number", "gsm8k", _gsm8k, ("max_new_tokens", "chat_template")
    ),
    "classification": Measure(
        "accuracy, F1 and Matthews' correlation of classes; Pearson's correlation of numbers",
        "classification",
        _classification,
    ),
    "summarization": Measure(
        "ROUGE-1, -2 and -L of greedy summaries", "summarization", _summarization, ("max_new_tokens",)
    ),
}
