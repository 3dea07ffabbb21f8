"""The tokenizer beside a model, and the special tokens that it puts around a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loftq.display import one_line
from loftq.errors import SourceError
from loftq.formats.model_config import check_beside

_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def read_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model's folder, as transformers loads it. Raises SourceError where there is none.

    Without a tokenizer's files transformers may make an empty one from the model's config alone, which is refused.
    """
    from transformers import AutoTokenizer

    missing = f"{folder} has no tokenizer that can be loaded: copy the tokenizer's files of the original model there"
    if not any(path.is_file() for pattern in _FILES for path in folder.glob(pattern)):
        raise SourceError(missing)
    check_beside(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a tokenizer's own class may raise anything for files that make no sense
        raise SourceError(f"{missing} ({one_line(error, 200)})") from error


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after a text."""
    plain, dressed = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    for i in range(len(dressed) - len(plain) + 1):
        if dressed[i : i + len(plain)] == plain:
            return dressed[:i], dressed[i + len(plain) :]
    return [], []
