"""GSM8K (arXiv 2110.14168): grade school mathematics, answered in steps that end in `#### NUMBER`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loftq.errors import OptionError
from loftq.hub.columns import find_columns, text_of
from loftq.hub.conversations import Conversation
from loftq.training import encoding
from loftq.training.answering import answers
from loftq.training.encoding import Encoder
from loftq.training.ends import Ends, turn_end
from loftq.training.opened import Opened
from loftq.training.tasks.language_modelling import conversations, encoded
from loftq.training.tasks.task import GENERATORS, Measure, MeasureSettings, TrainingTask, encoder_of

if TYPE_CHECKING:
    from datasets import Dataset

ROLES = {"question": ("question", "prompt"), "answer": ("answer", "response")}
MOST_TOKENS = 256  # default length of an answer
_STOP = "Question:"  # a model that does not stop writes the next question
PROMPT = "Question: {}\nAnswer:"
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def encode(rows: Dataset, columns: Mapping[str, str], encoder: Encoder) -> Dataset:
    """Encode examples of a question and its answer in steps."""
    names = find_columns(rows, ROLES, columns)
    if encoding.uses_template(encoder, default=False):
        return conversations(rows, lambda row: _turn(row, names), encoder)
    question, answer = names["question"], names["answer"]
    return encoded(
        rows,
        lambda row: encoder.pair(PROMPT.format(text_of(row, question)), f" {text_of(row, answer)}"),
    )


def prompt(question: str, encoder: Encoder, room: int) -> list[int]:
    """Encode a question so that `room` tokens are left for the answer."""
    if encoding.uses_template(encoder, default=False):
        return encoder.templated([{"role": "user", "content": question}], room)
    return encoder.prompt(PROMPT.format(question), room)


def ends(encoder: Encoder) -> Ends:
    """What ends an answer: the next question, and with a chat template what it writes after an answer."""
    end = turn_end(encoder.tokenizer) if encoding.uses_template(encoder, default=False) else Ends()
    return replace(end, texts=(_STOP, *end.texts))


def final_number(answer: str) -> str | None:
    """Return the first number after the last `####`, or else the last number in the text; None if there is none.

    It has its shortest form: `1,200.00` becomes `1200`.
    """
    marked = answer.rpartition("####")
    numbers = _NUMBER.findall(marked[2]) if marked[1] else []
    numbers = numbers[:1] or _NUMBER.findall(answer)[-1:]
    if not numbers:
        return None
    digits = numbers[0].replace(",", "").replace("$", "")
    return f"{float(digits):.10g}" if len(digits) < 16 else digits


def reference(row: Mapping[str, Any], column: str) -> str:
    """Return the number that an answer is compared with. Raises OptionError if the column holds no number."""
    answer = text_of(row, column)
    number = final_number(answer)
    if number is None:
        raise OptionError(
            f"column {column!r} of the data holds {answer!r:.80}, but an answer with a number was expected: name the "
            "right column with --column answer=NAME"
        )
    return number


def _turn(row: Mapping[str, Any], columns: Mapping[str, str]) -> Conversation:
    messages = [
        {"role": "user", "content": text_of(row, columns["question"])},
        {"role": "assistant", "content": text_of(row, columns["answer"])},
    ]
    return Conversation(messages, learned=[True, True])


def measure(opened: Opened, rows: Any, settings: MeasureSettings) -> dict[str, float]:
    columns = find_columns(rows, ROLES, settings.columns)
    expected = [reference(row, columns["answer"]) for row in rows]
    limit = settings.max_new_tokens or MOST_TOKENS
    encoder = encoder_of(settings, opened)
    prompts = [prompt(text_of(row, columns["question"]), encoder, limit) for row in rows]
    stops = ends(encoder)
    texts = answers(
        opened, prompts, limit, batch_size=settings.batch_size, ends=stops, quiet=settings.quiet, desc="gsm8k"
    )
    right = [final_number(answer) == number for answer, number in zip(texts, expected, strict=True)]
    return {"exact match": sum(right) / len(right), "questions": len(right)}


TASKS = {
    "gsm8k": TrainingTask(
        "grade school mathematics: questions and answers; only answers add to the loss", GENERATORS, ROLES, encode
    )
}
MEASURES = {
    "gsm8k": Measure(
        "greedy answers to GSM8K, exact match of the final number",
        "gsm8k",
        measure,
        ("max_new_tokens", "chat_template"),
    )
}
