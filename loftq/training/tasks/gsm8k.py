"""GSM8K (arXiv 2110.14168): grade school mathematics, answered in steps that end in `#### NUMBER`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loftq.errors import OptionError
from loftq.training import encoding
from loftq.training.data import find_columns, text_of
from loftq.training.encoding import Encoder
from loftq.training.tasks.language_modelling import conversations, encoded

if TYPE_CHECKING:
    from datasets import Dataset

ROLES = {"question": ("question", "prompt"), "answer": ("answer", "response")}
MOST_TOKENS = 256  # of an answer, where nothing is said
STOP = "Question:"  # a model that goes on asks itself the next one
_PROMPT = "Question: {}\nAnswer:"
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def encode(rows: Dataset, columns: Mapping[str, str], encoder: Encoder) -> Dataset:
    """Examples of a question and its answer in steps."""
    found = find_columns(rows, ROLES, columns)
    if encoding.uses_template(encoder, default=False):
        return conversations(rows, lambda row: _turn(row, found), encoder)
    asked, said = found["question"], found["answer"]
    return encoded(
        rows,
        lambda row: encoder.pair(_PROMPT.format(text_of(row, asked)), f" {text_of(row, said)}"),
    )


def prompt(question: str, encoder: Encoder, room: int) -> list[int]:
    """What a model is asked, to answer in `room` tokens."""
    if encoding.uses_template(encoder, default=False):
        return encoder.templated([{"role": "user", "content": question}], room)
    return encoder.prompt(_PROMPT.format(question), room)


def final_number(answer: str) -> str | None:
    """The number after the last `####`, or else the last one of all, in its shortest form: `1,200.00` is `1200`."""
    marked = answer.rpartition("####")
    found = _NUMBER.findall(marked[2]) if marked[1] else []
    found = found[:1] or _NUMBER.findall(answer)[-1:]
    if not found:
        return None
    digits = found[0].replace(",", "").replace("$", "")
    return f"{float(digits):.10g}" if len(digits) < 16 else digits


def reference(row: Mapping[str, Any], column: str) -> str:
    """The number that an answer is compared with. Raises OptionError where there is none."""
    answer = text_of(row, column)
    number = final_number(answer)
    if number is None:
        raise OptionError(
            f"column {column!r} of the data holds {answer!r:.80} where an answer with a number was expected: name the "
            "right one with --column answer=NAME"
        )
    return number


def _turn(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": text_of(row, columns["question"])},
        {"role": "assistant", "content": text_of(row, columns["answer"])},
    ]
