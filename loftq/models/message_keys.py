"""Tells the keys of a message that say something from those that only say something about it."""

from __future__ import annotations

import re
from typing import Any

_NOTES = re.compile(
    r"(\w+_)?(id|ids|uuid|guid|hash|ip)|(created|updated)(_at)?|index|idx|turn|turn_identifier|rank|\w*time\w*|date"
    r"|source|origin|url|model|model_name|lang|language|locale|country|state|header|score|rating|quality|votes|tokens"
    r"|\w+_tokens|token_count|length|finish_reason|stop_reason|usage|meta|metadata|annotations|logprobs|tags|category"
    r"|toxic|toxicity|redacted|moderation|feedback|author|user|status|type"
)


def says_something(key: str, value: Any) -> bool:
    """Whether a key of a message holds a part of what is said, and not nothing or a note such as an id or a time."""
    empty = not (value.strip() if isinstance(value, str) else value)
    return not empty and _NOTES.fullmatch(key) is None
