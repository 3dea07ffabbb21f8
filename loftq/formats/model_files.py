"""The files that belong to a model beside its weights, by name. No other file of a model's folder is copied.

The names are those that transformers writes and its tokenizers declare: the configuration of generation and of
processors, the tokenizer, chat templates, and the licence. Everything else stays behind: hidden files, the state of a
training, files of other programs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from loftq.formats.disk import is_inside
from loftq.formats.links import refuse_outside

TEMPLATES = "additional_chat_templates"  # a folder of .jinja files
_CONFIGURATION = (
    "generation_config.json",
    "*processor_config.json",
    "feature_extractor*.json",
    "audio_tokenizer_config.json",
    "configuration.json",
)
_TOKENIZER = (
    "tokenizer*.json",
    "tokenizer.model.v*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab*.json",
    "*vocab*.txt",
    "vocab.bpe",
    "encoder.json",
    "merges*.txt",
    "dict.txt",
    "bpe.codes",
    "emoji.json",
    "normalizer.json",
    "byte_maps.json",
    "word_shape.json",
    "word_pronunciation.json",
    "tekken.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.tokenizer",
)
_TEMPLATE = ("chat_template*.json", "*.jinja", f"{TEMPLATES}/*.jinja")
_WORDS = ("license", "licence", "notice", "copying")
_LICENCE = (
    *(f"{start}*" for word in _WORDS for start in (word, word.title(), word.upper())),
    "*LICENSE*",
    "*_TERMS*",
    "USE_POLICY*",
)
SIDE_FILES = (*_CONFIGURATION, *_TOKENIZER, *_TEMPLATE, *_LICENCE)
_LICENCE_NAME = re.compile(r"[^.]*(\.\d+)*(\.(txt|md|rst|html|pdf|apache.*|bsd.*|mit))?", re.IGNORECASE)

# Files that are read in a model's folder and are never copied from it.
OWN_FILES = (
    "config.json",
    "README.md",
    "loftq.json",
    "training.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
)


def is_side_file(name: str, code: bool = False) -> bool:
    """Whether a name, relative to a model's folder, is that of a file to copy. With `code`, Python files are too."""
    folder, _, file = name.rpartition("/")
    if folder not in ("", TEMPLATES) or file.startswith(".") or not is_inside(name) or not file.isprintable():
        return False
    if any(fnmatchcase(name, pattern) for pattern in _LICENCE):
        return not folder and _LICENCE_NAME.fullmatch(file) is not None
    patterns = (f"{TEMPLATES}/*.jinja",) if folder else (*SIDE_FILES, *(["*.py"] if code else []))
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_model_file(name: str, code: bool = False) -> bool:
    """Whether libraries that open a model or an adapter read a file of this name."""
    return is_side_file(name, code) or any(fnmatchcase(name, pattern) for pattern in OWN_FILES)


def model_file_names(folder: Path, code: bool = False) -> Iterator[str]:
    """The names of the files in a folder that libraries read when they open a model or an adapter, links included."""
    for path in sorted(folder.iterdir()):
        if is_model_file(path.name, code):
            yield path.name
    for path in sorted((folder / TEMPLATES).glob("*")):
        yield path.relative_to(folder).as_posix()


def check_model_folder(folder: Path, code: bool = False) -> None:
    """Raise CheckpointError if a file that is read when a model's folder is opened is a link out of this folder."""
    refuse_outside(folder, model_file_names(folder, code))
