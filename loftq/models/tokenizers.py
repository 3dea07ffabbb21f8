"""The tokenizer beside a model, and the special tokens that it puts around a text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loftq.display import one_line
from loftq.errors import SourceError
from loftq.formats.model_config import check_beside

_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has any file of a tokenizer."""
    return any(path.is_file() for pattern in _FILES for path in folder.glob(pattern))


def gguf_file(folder: Path) -> str | None:
    """The name of the GGUF file in a folder; None if it has none."""
    return next((path.name for path in sorted(folder.glob("*.gguf"))), None)


def read_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model's folder, as transformers loads it. Raises SourceError where there is none.

    Without a tokenizer's files transformers may make an empty one from the model's config alone, which is refused. A
    GGUF file has its tokenizer in it.
    """
    from transformers import AutoTokenizer

    missing = f"{folder} has no tokenizer that can be loaded: copy the tokenizer's files of the original model there"
    options: dict[str, Any] = {}
    if not has_tokenizer(folder):
        file = gguf_file(folder)
        if file is None:
            raise SourceError(missing)
        options["gguf_file"] = file
    else:
        check_beside(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # a tokenizer's own class may raise anything for files that make no sense
        raise SourceError(f"{missing} ({one_line(error, 200)})") from error


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after a text."""
    plain, dressed = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    for i in range(len(dressed) - len(plain) + 1):
        if dressed[i : i + len(plain)] == plain:
            return dressed[:i], dressed[i + len(plain) :]
    return [], []


def embedding_rows(model: Any) -> int:
    """The number of tokens that a model has embeddings for."""
    return int(model.get_input_embeddings().weight.shape[0])


def has_token_embeddings(model: Any) -> bool:
    """Whether a model has embeddings of tokens. Models of several parts have them in their parts, or have none."""
    try:
        return embedding_rows(model) > 0
    except (AttributeError, NotImplementedError):
        return False


def check_ids(ids: Iterable[int], rows: int, tokenizer: Any) -> None:
    """Raise SourceError for a token of the tokenizer that a model with embeddings of so many rows does not have."""
    largest = max(ids, default=0)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise SourceError(
            f"the tokenizer in {tokenizer.name_or_path} produces the token {largest}, but the last row of the model's "
            f"embeddings is {rows - 1}: it belongs to another model, or {token!r:.40} was added to it and not to "
            "the model: copy the tokenizer of this model there"
        )
