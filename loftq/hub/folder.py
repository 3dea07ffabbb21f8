"""The folder of a model, or of an adapter, by its path or by its id on the Hub, from which its files are downloaded.

An adapter is named like a model, or as `OWNER/NAME/FOLDER`, which is where `loftq push --adapter` puts it.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from loftq.display import one_line
from loftq.errors import SourceError
from loftq.formats.adapter import CONFIG, WEIGHTS
from loftq.formats.model_config import FILE
from loftq.formats.model_files import SIDE_FILES
from loftq.hub.errors import checked_token, explain_source_refusals
from loftq.hub.names import find_folder, repository_of, subfolder_of
from loftq.hub.snapshot import download

_RECORD = "training.json"  # of `loftq train`, beside a trained adapter
_OF_ADAPTERS = (CONFIG, WEIGHTS, _RECORD, *SIDE_FILES)


def fetch_folder(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    patterns: Collection[str] | None = None,
) -> Path:
    """The folder with this path, or that of a repository, whose files are downloaded, or only those of `patterns`.

    Without a network, the folder is that of the cache. Raises SourceError if there is none.
    """
    # The base class of all errors of the client's transport: from httpx in huggingface_hub 1, from httpx2 in 2.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    folder = find_folder(str(name), revision)
    if folder is not None:
        return folder
    repo, revision = repository_of(str(name), revision)
    token = checked_token(token)
    try:
        with explain_source_refusals(repo, revision):
            return download(repo, revision=revision, token=token, patterns=patterns)
    except (HTTPError, OSError) as error:
        raise SourceError(
            f"cannot download {repo!r} from the Hub, and the cache does not hold it: {one_line(error)}"
        ) from error


def fetch_adapter(name: str | Path) -> Path:
    """The folder of an adapter with this path, or of one on the Hub. Raises SourceError if there is none."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if "/" not in str(name):
        raise SourceError(f"no such folder: {name}: check the path, or name an adapter on the Hub as OWNER/NAME")
    repo, below = subfolder_of(str(name)) or (str(name), "")
    prefix = f"{below}/" if below else ""
    folder = fetch_folder(repo, patterns=[prefix + file for file in _OF_ADAPTERS])
    if not (folder / below / CONFIG).is_file():
        raise SourceError(
            f"{name} on the Hub has no {prefix}{CONFIG}: name the repository of an adapter, or its folder in a "
            "repository, as OWNER/NAME/FOLDER"
        )
    return folder / below


def is_adapter_repository(name: str) -> bool:
    """Whether a name is that of a repository on the Hub that holds an adapter and no model. Raises SourceError."""
    if find_folder(name) is not None:
        return False
    folder = fetch_folder(name, patterns=[CONFIG, FILE])
    return (folder / CONFIG).is_file() and not (folder / FILE).is_file()
