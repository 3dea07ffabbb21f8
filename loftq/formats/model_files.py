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

from loftq.errors import CheckpointError
from loftq.formats.disk import is_inside
from loftq.formats.links import refuse_outside
from loftq.formats.schema import read_json

TOKENIZER = "tokenizer_config.json"  # every tokenizer of transformers has it
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
_MODULES = "modules.json"  # the modules of sentence-transformers, each with its folder
_SENTENCES = ("config_sentence_transformers.json", "sentence_bert_config.json")
_MODULE_FILES = ("*.json", "*.txt", "*.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
_SMALL = 2**24  # bytes; configurations and word lists are smaller
SENTENCE_FILES = (_MODULES, *_SENTENCES)
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


def is_tokenizer_file(name: str) -> bool:
    """Whether a name, relative to a model's folder, is that of a file of its tokenizer or of its chat template."""
    patterns = (*_TOKENIZER, *_TEMPLATE)
    return is_side_file(name) and any(fnmatchcase(name, pattern) for pattern in patterns)


def is_model_file(name: str, code: bool = False) -> bool:
    """Whether libraries that open a model or an adapter read a file of this name."""
    return is_side_file(name, code) or any(fnmatchcase(name, pattern) for pattern in OWN_FILES)


def model_file_names(folder: Path, code: bool = False) -> Iterator[str]:
    """The names of the files in a folder that libraries read when they open a model or an adapter, links included."""
    for path in sorted(folder.iterdir()):
        if is_model_file(path.name, code):
            yield path.name
    yield from module_file_names(folder)
    for path in sorted((folder / TEMPLATES).glob("*")):
        yield path.relative_to(folder).as_posix()


def module_file_names(folder: Path) -> list[str]:
    """The files of sentence-transformers in a model's folder: those that list its modules, and those of each module.

    The list is empty if a module cannot be copied whole, because the folder would not load then: if it lies elsewhere
    than in a folder of its own in this one, or if its weights are pickles.
    """
    paths = _module_paths(folder)
    if paths is None:
        return []
    names = [path.name for path in sorted(folder.iterdir()) if path.name in (_MODULES, *_SENTENCES)]
    for path in filter(None, paths):
        own = _names_of_module(folder, path)
        if own is None:
            return []
        names += own
    return names


def module_patterns(folder: Path) -> list[str]:
    """Patterns of the files to download for the modules of sentence-transformers that a folder lists."""
    paths = [path for path in _module_paths(folder) or () if path and is_module_file(f"{path}/config.json")]
    return [f"{path}/{pattern}" for path in paths for pattern in _MODULE_FILES]


def _module_paths(folder: Path) -> list[str] | None:
    """The folders of the modules, empty for the folder itself; None without a valid list."""
    try:
        refuse_outside(folder, [_MODULES])
        if not (folder / _MODULES).is_file():
            return None
        modules = read_json(folder / _MODULES, [{"path": str}], error=CheckpointError, foreign=True)
    except CheckpointError:
        return None
    return [module["path"] for module in modules]


def is_module_file(name: str) -> bool:
    """Whether a name is that of a file of sentence-transformers: of the folder itself, or of a module in it."""
    folder, _, file = name.rpartition("/")
    if not folder:
        return file in (_MODULES, *_SENTENCES)
    hidden = folder.startswith(".") or file.startswith(".") or "/" in folder or folder == TEMPLATES
    return not hidden and name.isprintable() and any(fnmatchcase(file, pattern) for pattern in _MODULE_FILES)


def _names_of_module(folder: Path, path: str) -> list[str] | None:
    if not is_module_file(f"{path}/config.json") or (folder / path).is_symlink() or not (folder / path).is_dir():
        return None
    names = sorted(file.name for file in (folder / path).iterdir())
    pickled = any(fnmatchcase(name, pattern) for name in names for pattern in _PICKLES)
    if pickled and not any(name.endswith(".safetensors") for name in names):
        return None
    own = [f"{path}/{name}" for name in names if is_module_file(f"{path}/{name}")]
    large = [name for name in own if not name.endswith(".safetensors") and (folder / name).stat().st_size > _SMALL]
    return None if large else own


def check_model_folder(folder: Path, code: bool = False) -> None:
    """Raise CheckpointError if a file that is read when a model's folder is opened is a link out of this folder."""
    refuse_outside(folder, model_file_names(folder, code))
