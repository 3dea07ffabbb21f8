"""Finds passwords and access tokens in names and texts, so that no record, card or message holds one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

_HIDDEN = "***"
_WORDS = {"token", "secret", "password", "passwd", "passphrase", "credential", "credentials", "apikey", "bearer"}
_KINDS_OF_KEY = ("api", "access", "secret", "private", "auth", "signing", "encryption")
_OF_A_TOKENIZER = ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "image")  # `pad_token` is no secret
_SECRET_NAME = rf"(?<![\w-])[\w-]{{0,40}}(?:{'|'.join(sorted(_WORDS))}|(?:{'|'.join(_KINDS_OF_KEY)})[_-]?key)"
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY", "COMET_API_KEY")
_SHORTEST = 8  # characters of a variable that is looked for: a shorter one may be a part of any word
# Each pattern keeps its groups and hides the rest.
_PATTERNS = (
    re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/@'\"]+(@)"),  # https://user:password@host
    re.compile(r"\b(hf_|api_org_)[A-Za-z0-9]{12,}()"),
    re.compile(r"\b(gh[pousr]_|github_pat_|glpat-|sk-|xox[abp]-)[A-Za-z0-9_-]{12,}()"),
    re.compile(r"(\b[Bb]earer\s+)[\w.~+/=-]{8,}()"),
    re.compile(rf"({_SECRET_NAME}['\"]?\s*=\s*['\"]?)[^\s'\",;&)}}\]]+()", re.IGNORECASE),
    re.compile(rf"({_SECRET_NAME}['\"]\s*:\s*['\"])[^'\"]+()", re.IGNORECASE),
    re.compile(r"([?&](?:X-Amz-\w+|Signature|Policy|Key-Pair-Id|sig)=)[^\s&'\"]+()", re.IGNORECASE),
)


def is_secret_name(name: str) -> bool:
    """Whether a setting of this name holds a secret: `hub_token`, `api_key`; not `pad_token` or `max_tokens`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_").split("_")
    if words[-1] == "token" and words[0] in _OF_A_TOKENIZER:
        return False
    pairs = pairwise(words)
    return not _WORDS.isdisjoint(words) or any(kind in _KINDS_OF_KEY and key == "key" for kind, key in pairs)


def redacted(text: str) -> str:
    """A text with `***` in the place of each password and access token in it."""
    for variable in _VARIABLES:
        value = os.environ.get(variable, "").strip()
        if len(value) >= _SHORTEST:
            text = text.replace(value, _HIDDEN)
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\g<1>{_HIDDEN}\g<2>", text)
    return text


def find_secret(values: Any, name: str = "") -> str | None:
    """The name of the first setting among nested values that is a secret, or whose text holds one; None without one.

    A table inside a table is named as in `outer.inner`.
    """
    if isinstance(values, Mapping):
        for key, value in values.items():
            path = f"{name}.{key}" if name else str(key)
            if is_secret_name(str(key)) and value is not None and not isinstance(value, bool):
                return path
            if (secret := find_secret(value, path)) is not None:
                return secret
    elif isinstance(values, (list, tuple)):
        for value in values:
            if (secret := find_secret(value, name)) is not None:
                return secret
    elif isinstance(values, str) and redacted(values) != values:
        return name
    return None
