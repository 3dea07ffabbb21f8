"""Finds the answers of a conversation in the text that a chat template writes.

The answers are what a template marks with `{% generation %}`. In other templates, an answer begins where the template
ends the prompt before it, and ends where the conversation ends that has it as its last message. Some templates write
an earlier turn differently from the last one: without its reasoning, without a mark for its end, or with the tools in
another place. There the answer is found by a character that is put around its texts and that the text does not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from loftq.errors import OptionError
from loftq.hub.conversations import Message
from loftq.models.chat_templates import marked_answers, without_template, write_messages
from loftq.training.spans import Span, in_common

Piece = tuple[str, bool]  # a text, and whether the model learns to write it
_TEXTS = ("content", "reasoning_content", "reasoning", "thinking", "tool_calls")  # keys that hold an answer's texts
_CHARACTERS = [chr(code) for code in range(0xE000, 0xE100)]  # of no language


def turns(
    tokenizer: Any,
    messages: Sequence[Message],
    variables: Mapping[str, Any] | None = None,
    learned: Sequence[bool] | None = None,
) -> list[Piece]:
    """Split a conversation, as the chat template writes it, into pieces; the assistant's messages are learned.

    `learned` tells for each message whether it is, if it is the assistant's. A first message of the assistant answers
    nothing and is not learned, unless the template marks it. Raises OptionError for a conversation that does not end
    with an answer, that has nothing else than one message of the assistant, or whose answers cannot be found.
    """
    variables = variables or {}
    answers = _answers(messages)
    check_roles(messages)
    talk = _Talk(tokenizer, messages, variables, write_messages(tokenizer, messages, variables=variables))
    whole = talk.text
    wanted = [at for at in answers if learned is None or learned[at]]
    marked = marked_answers(tokenizer, messages, variables)
    spans = _of_wanted(marked, answers, wanted) if marked else [talk.answer(at) for at in wanted if at > 0]
    pieces: list[Piece] = []
    place = 0
    for start, end in spans:
        start, end = max(start, place), max(end, place)
        pieces += [(whole[place:start], False), (whole[start:end], True)]
        place = end
    return [piece for piece in [*pieces, (whole[place:], False)] if piece[0]]


def _answers(messages: Sequence[Message]) -> list[int]:
    return [at for at, message in enumerate(messages) if message.get("role") == "assistant"]


def check_roles(messages: Sequence[Message]) -> None:
    """Raise OptionError for a conversation that has no answer at its end, or nothing else."""
    answers = _answers(messages)
    if answers[-1:] != [len(messages) - 1]:
        step = "remove its messages after the last answer" if answers else "remove it"
        raise OptionError(
            f"a conversation in the data does not end with a message of the assistant: {step}, or add an answer"
        )
    if len(messages) == 1:
        raise OptionError("a conversation has a single message, which answers nothing: add the message before it")


def _of_wanted(marked: list[Span], answers: Sequence[int], wanted: Sequence[int]) -> list[Span]:
    if len(wanted) == len(answers):
        return marked
    if len(marked) != len(answers):
        raise OptionError(
            f"the chat template marks {len(marked)} parts as generated in a conversation with {len(answers)} answers, "
            "of which some are not to be learned, so they cannot be told apart: remove these answers or their weights"
        )
    return [span for at, span in zip(answers, marked, strict=True) if at in wanted]


class _Place(NamedTuple):
    """Where the texts of a message begin, where the message ends, and whether that is more than where its texts end."""

    first: int
    end: int
    is_whole: bool


@dataclass(frozen=True)
class _Talk:
    """The messages of a conversation and the text that the template writes."""

    tokenizer: Any
    messages: Sequence[Message]
    variables: Mapping[str, Any]
    text: str

    def write(self, messages: Sequence[Message], *, answer: bool = False) -> str | None:
        """The text of a part of the conversation, or None if the template refuses that part alone."""
        try:
            return write_messages(self.tokenizer, messages, answer=answer, variables=self.variables)
        except OptionError:
            return None

    def answer(self, at: int) -> Span:
        """The place of an answer in the text."""
        before = self.write(self.messages[:at], answer=True)
        after = self.text if at == len(self.messages) - 1 else self.write(self.messages[: at + 1])
        if before and after and self.text.startswith(after) and after.startswith(before):
            return len(before), len(after)
        place = self.place(at)
        if place is None:
            raise OptionError(
                f"the chat template writes the answer in message {at + 1} in a way in which it cannot be found: "
                f"{without_template(self.messages, self.variables)}correct the template, or mark answers in it with "
                "{% generation %}"
            )
        return self.beginning(at, before, place.first), place.end

    def beginning(self, at: int, before: str | None, first: int) -> int:
        """Where an answer begins whose own texts begin at `first`: after what begins an answer in a prompt."""
        if before and self.text.startswith(before) and len(before) <= first:
            return len(before)
        asked = self.write(self.messages[:at])
        if before is None or asked is None or not before.startswith(asked):
            return first
        opening, earlier = before[len(asked) :], self.place(at - 1)
        if not opening:
            return earlier.end if earlier is not None and earlier.is_whole else first
        found = self.text.rfind(opening, 0 if earlier is None else earlier.end, first + len(opening))
        if found >= 0:
            return found + len(opening)
        if at == len(self.messages) - 1:
            raise self.other_opening(opening, first)
        if earlier is None or not earlier.is_whole:
            return first
        return min(first, earlier.end + in_common(opening, self.text[earlier.end :]))

    def other_opening(self, opening: str, first: int) -> OptionError:
        """An error for a template that begins an answer in a prompt as it does not begin it in a conversation."""
        head, last = self.text[:first], self.messages[-1]
        missing = next(opening[size:] for size in range(len(opening), -1, -1) if head.endswith(opening[:size]))
        changed = {**last, "content": f"{missing}{last.get('content') or ''}"}
        before, text = self.write(self.messages[:-1], answer=True), self.write([*self.messages[:-1], changed])
        begun = before is not None and text is not None and text.startswith(before)
        return OptionError(
            f"the chat template begins an answer with {missing!r} in a prompt but not in a conversation, so a trained "
            f"model would be asked for what it did not learn: {without_template(self.messages, self.variables)}"
            f"{'begin the content of the answers in the data with it, or ' if begun else ''}use a template that begins "
            "both alike"
        )

    def place(self, at: int) -> _Place | None:
        """Where a message is, or None if it cannot be found."""
        mark = next((character for character in _CHARACTERS if character not in self.text), None)
        if mark is None:
            return None
        message = self.messages[at]
        for keys in (_TEXTS, ("content",), ("tool_calls",), _TEXTS[1:4]):
            marked_message = {key: surround(value, mark) if key in keys else value for key, value in message.items()}
            marked = [*self.messages[:at], marked_message, *self.messages[at + 1 :]]
            text = self.write(marked)
            if text is None or mark not in text or text.replace(mark, "") != self.text:
                continue
            last = text.rindex(mark) + 1 - text.count(mark)
            alone = self.write(marked[: at + 1])
            end = None if alone is None else self.end(alone.rpartition(mark)[2], last)
            return _Place(text.index(mark), last if end is None else end, end is not None)
        return None

    def end(self, tail: str, last: int) -> int | None:
        """Where a message ends whose texts end at `last`, and that ends with `tail` if it is the last message.

        If only the beginning of the tail is there, it counts up to the last of its tokens that were added.
        """
        if self.text.startswith(tail, last):
            return last + len(tail)
        added = [token for token in self.tokenizer.get_added_vocab() if token and token in tail]
        ends = {len(tail.rstrip()), *(tail.find(token) + len(token) for token in added)}
        found = [end for end in ends if end and self.text.startswith(tail[:end], last)]
        return last + max(found) if found else None


def surround(value: Any, mark: str) -> Any:
    """Put a mark around every text in a value, inside of the white space at its ends, which templates remove."""
    if isinstance(value, str):
        text = value.strip()
        return value.replace(text, f"{mark}{text}{mark}", 1) if text else value
    if isinstance(value, list):
        return [surround(one, mark) for one in value]
    if isinstance(value, dict):
        kept = ("type", "id")  # which templates compare with others
        return {key: one if key in kept else surround(one, mark) for key, one in value.items()}
    return value
