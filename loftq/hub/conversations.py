"""Reads a row into a conversation: messages, what is given to the chat template beside them, and which are learned.

Rows hold messages as OpenAI writes them (`role` and `content`), as ShareGPT does (`from` and `value`) or as XTuner does
(`input` and `output` of a turn); or an instruction with its answer as Alpaca does, perhaps with a system message and a
history; or a prompt and its completion, each of them messages, as trl does. `datasets` gives every row
the keys of all rows, with None where a row has none, so None means that a key is not there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loftq.errors import OptionError
from loftq.hub.columns import Rows, find_columns, text_of
from loftq.hub.image_messages import read_parts, with_images
from loftq.hub.images import ImageSource

Row = Mapping[str, Any]
Message = dict[str, Any]
_ROLES = dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant") | {"human": "user"}
_ROLES_OF_SHARE_GPT = {"function_call": "assistant"} | dict.fromkeys(("observation", "function_response"), "tool")
_WEIGHTS = ("weight", "train", "training", "trainable", "loss")  # keys that tell whether a message is learned
_VARIABLES = (  # columns with the names that templates give to what they read beside the messages
    *("documents", "custom_tools", "builtin_tools", "tools_in_user_message", "xml_tools", "python_tools"),
    *("enable_thinking", "reasoning_effort", "model_identity", "date_string"),
)
_REASONING = ("reasoning_content", "reasoning", "thinking")  # names of a column, or a key, of an answer's reasoning
BESIDE = (*_VARIABLES, "chat_template_kwargs", *_REASONING)  # columns that are read by their own names
_TURNS = (("input", "output"), ("human", "assistant"), ("user", "assistant"))  # keys of a turn in one piece
_OTHER_MEDIA = ("audio", "audios", "video", "videos")


ROLES = {
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat"),
    "prompt": ("prompt", "instruction", "question", "context", "source"),
    "response": ("response", "completion", "output", "answer", "target"),
    "input": ("input",),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "images": ("images", "image"),
    "tools": ("tools", "functions"),
}
_OF_MESSAGES = ("messages", "system", "tools", "images")
_OPTIONAL = ("input", "system", "history", "tools", "images")


@dataclass(frozen=True)
class Conversation:
    """Messages, what the template gets beside them, and for each message whether it may be learned.

    If there are `images`, the content of messages is parts, and each image has its part.
    """

    messages: list[Message]
    variables: dict[str, Any] = field(default_factory=dict)
    learned: list[bool] = field(default_factory=list)
    images: list[ImageSource] = field(default_factory=list)


def chosen_columns(rows: Rows, columns: Mapping[str, str]) -> dict[str, str]:
    """The columns of the roles that are read: those of messages, or those of prompts and answers."""
    names = find_columns(rows, ROLES, columns, optional=tuple(ROLES))
    if "messages" in names and ("messages" in columns or not {"prompt", "response"} & set(columns)):
        return {role: name for role, name in names.items() if role in _OF_MESSAGES}
    names = find_columns(rows, ROLES, columns, optional=("messages", *_OPTIONAL))
    return {role: name for role, name in names.items() if role != "messages"}


def conversation_of(row: Row, columns: Mapping[str, str]) -> Conversation:
    """Read a row with messages. `columns` are the columns of the roles in language_modelling.ROLES."""
    column = columns["messages"]
    given = _messages(_json(row[column], column), column)
    system = _system(row, columns)
    if system and given and given[0]["role"] == "system":
        if given[0].get("content") != system[0]["content"]:
            raise OptionError(
                f"column {columns['system']!r} and the first message of column {column!r} are two different system "
                "messages: remove one of them"
            )
        system = []
    learned = [_is_learned(message, number) for number, message in enumerate(given, 1)]
    return _conversation(row, columns, [*system, *map(_unweighted, given)], [False] * len(system) + learned)


def instruction_of(row: Row, columns: Mapping[str, str]) -> Conversation:
    """Read a row with a prompt and its response into a conversation, with the answers of its history before them.

    If the prompt and the response are lists of messages, only those of the response are learned.
    """
    if isinstance(row[columns["prompt"]], list):
        return _prompt_of_messages(row, columns)
    extra = row.get(columns.get("input", ""))
    if extra is not None and not isinstance(extra, str):
        extra = text_of(row, columns["input"])
    prompt = text_of(row, columns["prompt"])
    messages = [*_system(row, columns)]
    for asked, answered in _history(row, columns):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages += [
        {"role": "user", "content": f"{prompt}\n\n{extra}" if extra else prompt},
        {"role": "assistant", "content": text_of(row, columns["response"]), **_reasoning(row, columns)},
    ]
    return _conversation(row, columns, messages, [True] * len(messages))


def _conversation(row: Row, columns: Mapping[str, str], messages: list[Message], learned: list[bool]) -> Conversation:
    column = columns.get("images", "")
    messages, images = with_images(messages, row.get(column), column)
    return Conversation(messages, _variables(row, columns), learned, images)


def _prompt_of_messages(row: Row, columns: Mapping[str, str]) -> Conversation:
    """Read a row whose prompt is messages; the response is messages too, or a text."""
    asked = _messages(row[columns["prompt"]], columns["prompt"])
    response = row[columns["response"]]
    if isinstance(response, str):
        response = [{"role": "assistant", "content": response}]
    answered = _messages(response, columns["response"])
    for role in ("input", "history"):
        if row.get(columns.get(role, "")):
            raise OptionError(
                f"column {columns[role]!r} stands beside a prompt that is a list of messages: put its text into them"
            )
    system = [] if asked and asked[0]["role"] == "system" else _system(row, columns)
    learned = [_is_learned(message, number) for number, message in enumerate(answered, 1)]
    messages = [*system, *map(_unweighted, [*asked, *answered])]
    return _conversation(row, columns, messages, [False] * (len(messages) - len(learned)) + learned)


def _messages(value: Any, column: str) -> list[Message]:
    """The messages of a column. Raises OptionError for anything else."""
    try:
        given = [_renamed(message) for part in value for message in _of_turn(without_none(part))]
        if not all(isinstance(message["role"], str) and _has_text(message) for message in given):
            raise TypeError
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise OptionError(
            f"column {column!r} of the data holds {value!r:.80}, but messages were expected, each with a role and a "
            "content that is text"
        ) from error
    return given


def _of_turn(part: Any) -> list[Message]:
    """The messages of a turn that has a prompt and its answer in one piece; a message alone stays as it is."""
    keys = next((keys for keys in _TURNS if keys[1] in part and "role" not in part and "from" not in part), None)
    if keys is None:
        return [part]
    turn = [("system", part.get("system")), ("user", part.get(keys[0])), ("assistant", part[keys[1]])]
    return [{"role": role, "content": text} for role, text in turn if text]


def _unweighted(message: Message) -> Message:
    """A message without the keys that tell whether it is learned."""
    return {key: value for key, value in message.items() if key not in _WEIGHTS}


def without_none(value: Any) -> Any:
    """A value without the keys whose value is None, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_none(one) for key, one in value.items() if one is not None}
    return [without_none(one) for one in value] if isinstance(value, list) else value


def _renamed(given: Any) -> Message:
    """A message with OpenAI's names for the keys and roles of ShareGPT, and with its parts of text joined."""
    message: Message = dict(given)
    roles = _ROLES
    if "from" in message and "role" not in message:
        message["role"], roles = message.pop("from"), _ROLES | _ROLES_OF_SHARE_GPT
    for name in ("value", "text"):
        if name in message and "content" not in message:
            message["content"] = message.pop(name)
    role, content = message["role"], message.get("content")
    if role == "function_call" and role in roles:
        message["tool_calls"] = _calls(message.pop("content"))
    if isinstance(message.get("function_call"), dict):
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    if isinstance(content, list):
        message["content"] = read_parts(content)
    message["role"] = roles.get(role, role)
    return message


def _calls(value: str) -> list[dict[str, Any]]:
    """The calls of functions that ShareGPT writes as JSON: an object with a name and arguments, or a list of them."""
    calls = json.loads(value) if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    return [{"type": "function", "function": {**call, "name": call["name"]}} for call in calls]


def _has_text(message: Message) -> bool:
    content = message.get("content")
    if content is None:  # beside calls, or beside reasoning that was not answered yet
        return message["role"] == "assistant" and bool(message.get("tool_calls"))
    return isinstance(content, (str, list))


def _is_learned(message: Message, number: int) -> bool:
    """Whether a message may be learned. Raises OptionError for a weight that is neither 0 nor 1."""
    weights = {key: _number(message[key]) for key in _WEIGHTS if key in message}
    for key, weight in weights.items():
        if weight not in (0, 1):
            raise OptionError(f"message {number} has {key!r}: {weight!r:.40}, but 0 or 1 was expected: correct it")
        if weight == 1 and message["role"] != "assistant":
            raise OptionError(
                f"message {number} of the role {message['role']!r:.40} has {key!r}: {message[key]!r}, but only "
                "messages of the assistant are learned: set it to 0"
            )
    return all(weights.values())


def _number(value: Any) -> Any:
    """The number that a text is, such as the cell of a table; any other value unchanged."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _reasoning(row: Row, columns: Mapping[str, str]) -> Message:
    texts = [row[name] for name in _REASONING if isinstance(row.get(name), str) and name not in columns.values()]
    return {"reasoning_content": texts[0]} if texts and texts[0] else {}


def _system(row: Row, columns: Mapping[str, str]) -> list[Message]:
    column = columns.get("system", "")
    if row.get(column) is None or row[column] == "":
        return []
    return [{"role": "system", "content": text_of(row, column)}]


def _history(row: Row, columns: Mapping[str, str]) -> list[Sequence[str]]:
    column = columns.get("history", "")
    if not row.get(column):
        return []
    turns = _json(row[column], column)
    for turn in turns if isinstance(turns, list) else [turns]:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise OptionError(
                f"column {column!r} of the data holds {turns!r:.80}, but pairs of a prompt and an answer were expected"
            )
    return list(turns)


def _variables(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """What a row gives to the chat template beside the messages."""
    for column in _OTHER_MEDIA:
        if row.get(column):
            raise OptionError(f"column {column!r} holds something else than text, which is not learned: remove it")
    used = set(columns.values())
    found: dict[str, Any] = {name: row[name] for name in _VARIABLES if row.get(name) is not None and name not in used}
    column = columns.get("tools", "")
    if row.get(column):
        tools = _json(row[column], column)
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise OptionError(f"column {column!r} of the data holds {tools!r:.80}, but a list of tools was expected")
        wrap = column == "functions"  # OpenAI's older name, for what `tools` wraps
        found["tools"] = [{"type": "function", "function": tool} for tool in tools] if wrap else tools
    if row.get("chat_template_kwargs"):
        found |= _json(row["chat_template_kwargs"], "chat_template_kwargs")
    return {name: value for name, value in without_none(found).items() if value not in ("", [], {})}


def _json(value: Any, column: str) -> Any:
    """A value, or if it is a text, as in the cell of a table, the value that it holds as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise OptionError(
            f"column {column!r} of the data holds {value!r:.80}, which is neither a list nor JSON: correct it"
        ) from error
