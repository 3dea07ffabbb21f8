"""Finds the images of a conversation: in the parts of its messages, or in a column beside them.

A message has parts as OpenAI and transformers write them (`{"type": "image", "path": …}`, `{"type": "image_url", …}`),
or a text with `<image>` in the place of each image, as LLaVA's data have it. Images in a column belong to the places in
their order; if the messages have no places, the images stand before the text of the first prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loftq.errors import OptionError
from loftq.hub.images import ImageSource, source_of

Message = dict[str, Any]
PLACE = "<image>"
_KEYS = ("image", "path", "url", "image_url", "base64")  # of a part, with what names its image


def read_parts(parts: Sequence[Any]) -> str | list[dict[str, Any]]:
    """The content of a message in parts: their joined text, or if there are images, all parts by type."""
    read = [_part(part) for part in parts]
    if all(part["type"] == "text" for part in read):
        return "".join(part["text"] for part in read)
    return read


def with_images(messages: Sequence[Message], beside: Any, column: str) -> tuple[list[Message], list[ImageSource]]:
    """The messages with a part for each image, and the images in the order of these parts; `beside` is the column's.

    Without images, the messages stay as they are. Raises OptionError for a column that holds no images, and for images
    that are not as many as their places.
    """
    given = _column(beside, column)
    if not given and not any(isinstance(message.get("content"), list) for message in messages):
        return list(messages), []
    parted = [_parted(message, splits=bool(given)) for message in messages]
    places = [part for message in parted for part in _images_of(message)]
    open_places = [part for part in places if "source" not in part]
    if given and not places:
        first = next((message for message in parted if message["role"] == "user"), parted[0])
        open_places = [{"type": "image"} for _ in given]
        first["content"] = [*open_places, *first["content"]]
    if len(open_places) != len(given):
        raise OptionError(
            f"the row has {len(given)} images in column {column!r} and {len(open_places)} places for them in its "
            "messages: expected as many"
        )
    for part, source in zip(open_places, given, strict=True):
        part["source"] = source
    return parted, [part.pop("source") for message in parted for part in _images_of(message)]


def in_parts(messages: Sequence[Message]) -> list[Message]:
    """The messages with texts as parts, which is all that the templates of some models read."""
    return [_parted(message, splits=False) for message in messages]


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type", "text")
    if kind == "text":
        return {"type": "text", "text": str(part["text"])}
    if kind not in ("image", "image_url"):
        raise OptionError(
            f"a message has a part of type {kind!r:.40}, but only texts and images can be learned: remove it"
        )
    named = [part[key] for key in _KEYS if part.get(key) is not None]
    if not named:
        return {"type": "image"}
    value = named[0].get("url", named[0]) if isinstance(named[0], Mapping) else named[0]
    source = source_of(value)
    if source is None:
        raise OptionError(
            f"a message has a part of type {kind!r} that holds {value!r:.80}: expected a path or an image"
        )
    return {"type": "image", "source": source}


def _column(beside: Any, column: str) -> list[ImageSource]:
    """The images of a column: one, or a list of them."""
    if beside is None or beside == "":
        return []
    sources = [source_of(value) for value in (beside if isinstance(beside, list) else [beside])]
    found = [source for source in sources if source is not None]
    if len(found) != len(sources):
        raise OptionError(
            f"column {column!r} of the data holds {beside!r:.80}, but images were expected: paths or images"
        )
    return found


def _parted(message: Message, *, splits: bool) -> Message:
    """A message whose content is parts; a text is split where it has a place for an image."""
    content = message.get("content")
    if content is None:
        return dict(message)
    if isinstance(content, list):
        return {**message, "content": [dict(part) for part in content]}
    pieces = content.split(PLACE) if splits else [content]
    parts: list[dict[str, Any]] = []
    for at, piece in enumerate(pieces):
        parts += [{"type": "image"}] if at else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return {**message, "content": parts}


def _images_of(message: Message) -> list[dict[str, Any]]:
    return [part for part in message.get("content") or () if isinstance(part, dict) and part["type"] == "image"]
