"""Checks that a chat template writes all that a conversation says: what it leaves out would not be learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from loftq.errors import OptionError
from loftq.hub.conversations import Conversation, Message
from loftq.models.chat_templates import write_messages
from loftq.models.message_keys import says_something
from loftq.training.turns import surround

_MARK = chr(0xE0FF)  # a character of no language
_CALLED_BY_NAME = ("tool", "function")
_written: set[tuple[Any, ...]] = set()  # what templates are known to write


def check_written(tokenizer: Any, conversation: Conversation) -> None:
    """Raise OptionError for a key of a message, or a column such as `tools`, that the chat template does not write.

    What a template writes of one message it is taken to write of others with the same role and keys.
    """
    messages, variables = conversation.messages, conversation.variables
    template = str(tokenizer.chat_template)
    write = partial(write_messages, tokenizer)
    for name in ("tools", "documents"):
        known: tuple[Any, ...] = (template, name)
        if name in variables and known not in _written:
            others = {key: value for key, value in variables.items() if key != name}
            if write(messages, variables=variables) == _try(write, messages, others):
                raise _unwritten(f"column {name!r}", "remove the column")
            _written.add(known)
    for at, message in enumerate(messages):
        for key, value in message.items():
            if key == "role" or not says_something(key, value) or _is_repeated(messages, at, key):
                continue
            known = (template, message["role"], frozenset(message), key, len(value) if isinstance(value, list) else 1)
            if known in _written:
                continue
            write(messages, variables=variables)  # an error of the template has its own reason
            if not all(_is_written(write, messages, at, changed, variables) for changed in _changes(message, key)):
                raise _unwritten(f"{key!r} of message {at + 1}, of the role {message['role']!r:.40}", "remove it")
            _written.add(known)


def _unwritten(what: str, step: str) -> OptionError:
    return OptionError(
        f"the chat template does not write {what}, so it would not be learned: {step} if it does not matter, or use a "
        "template that writes it"
    )


def _is_repeated(messages: Sequence[Message], at: int, key: str) -> bool:
    """Whether a key is the name of a tool in its own message, which the call before it names too."""
    if key != "name" or messages[at]["role"] not in _CALLED_BY_NAME:
        return False
    calls = [call for message in messages[:at] for call in message.get("tool_calls") or ()]
    return messages[at]["name"] in [call.get("function", call).get("name") for call in calls]


def _changes(message: Message, key: str) -> Iterator[Message]:
    """Messages that differ from a message in one part of what a key holds."""
    value = message[key]
    if key == "content":
        yield {**message, key: surround(value, _MARK)}
    elif isinstance(value, list):
        for place in range(len(value)):
            yield {**message, key: value[:place] + value[place + 1 :]}
    else:
        yield {name: other for name, other in message.items() if name != key}


def _is_written(
    write: Any, messages: Sequence[Message], at: int, changed: Message, variables: Mapping[str, Any]
) -> bool:
    """Whether a change of a message changes the text, or else that of the conversation up to it.

    Templates leave the reasoning of earlier turns out. A template that refuses the change reads what was changed.
    """
    for part in (messages, messages[: at + 1]):
        text = _try(write, part, variables)
        if text is not None and text != _try(write, [*part[:at], changed, *part[at + 1 :]], variables):
            return True
    return False


def _try(write: Any, messages: Sequence[Message], variables: Mapping[str, Any]) -> str | None:
    try:
        return str(write(messages, variables=variables))
    except OptionError:
        return None
