"""What may be published: configurations and texts without the paths of this machine, which name its user."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")  # a token may look like a path
_TOKENS = re.compile(r"token(s|_decoder)?$|^(vocab|merges|id2label|label2id|chat_template|weight_map|layers|files)$")
_NAMES_A_PATH = re.compile(r"(^|_)(path|paths|file|files|dir|dirs|folder|cache|location|model|data|dataset)$")
_REST = r"(?:/[^\s/'\"`<>()\[\]{},;:]+)*/?"


def public_json(name: str, content: bytes) -> bytes:
    """The content of a JSON file without paths. A file without any, a vocabulary, and no JSON stay as they are."""
    if not name.endswith(".json") or name.rpartition("/")[2] in _VOCABULARIES:
        return content
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content
    public = without_paths(value)
    return content if public == value else (json.dumps(public, indent=2, sort_keys=True) + "\n").encode()


def without_paths(value: Any, key: str = "") -> Any:
    """Nested values in which the last part of a path replaces an absolute path.

    These are the paths under the home folder of anybody, and all paths under a key that names a file or a folder.
    """
    if isinstance(value, Mapping):
        return {
            name: inner if _TOKENS.search(str(name)) else without_paths(inner, str(name))
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return [without_paths(inner, key) for inner in value]
    if not isinstance(value, str):
        return value
    if _NAMES_A_PATH.search(key) and _is_absolute(value):
        return _last_part(value)
    return without_homes(value)


def without_homes(text: str) -> str:
    """A text in which the last part of a path replaces each path under a home folder."""
    home = Path.home()
    own = [re.escape(str(home)) + r"(?![\w.-])"] if len(home.parts) > 1 else []
    homes = "|".join([*own, r"/(?:home|Users)/[^\s/'\"`<>()]+", r"/root(?![\w.-])"])
    text = re.sub(rf"(?<![\w/.:~-])(?:file://)?(?:{homes}){_REST}", lambda match: _last_part(match[0]), text)
    return re.sub(r"\b[A-Za-z]:\\Users\\[^\s'\"`<>]+", lambda match: _last_part(match[0]), text)


def _is_absolute(text: str) -> bool:
    return text.startswith(("/", "~", "file://")) or PureWindowsPath(text).is_absolute()


def _last_part(path: str) -> str:
    windows = PureWindowsPath(path)
    return windows.name if windows.is_absolute() and not path.startswith("/") else PurePosixPath(path).name
