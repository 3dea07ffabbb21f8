"""Downloads from the Hub whose bytes are compared with the hashes that the Hub names.

The Hub's client compares the size of a file, but not its content. In its cache, a file has the name of its etag, which
is a hash of its content: SHA-256 for large files, and the SHA-1 of a git object for others. A large file is hashed once
after it was downloaded: a stamp in loftq's own cache holds the size and the time of the file that was hashed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection
from pathlib import Path

from loftq.errors import SourceError
from loftq.formats.disk import write_whole

_LARGE = 1 << 24  # bytes: smaller files are hashed whenever they are used


def download(
    repo: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    patterns: Collection[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Download the files of a model whose names match one of the patterns, and return their folder in the cache.

    Raises SourceError for a file with another content than the Hub says, and removes it from the cache if it was
    downloaded now. Also raises the errors of `huggingface_hub.snapshot_download`.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.file_download import repo_folder_name

    blobs = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"), "blobs")
    earlier = _etags(blobs)
    folder = Path(
        snapshot_download(
            repo,
            revision=revision,
            token=token,
            allow_patterns=None if patterns is None else list(patterns),
            local_files_only=local_files_only,
        )
    )
    check_hashes(repo, folder, patterns, _etags(blobs) - earlier)
    return folder


def check_hashes(
    repo: str, folder: Path, patterns: Collection[str] | None, downloaded: Collection[str] = frozenset()
) -> None:
    """Compare the files of a snapshot with their etags. `downloaded` are the etags of files that were downloaded now.

    Where the cache has no symbolic links, a file has no etag and is not compared. Raises SourceError.
    """
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_symlink()]
    for name in filter_repo_objects(names, allow_patterns=None if patterns is None else list(patterns)):
        blob = Path(os.path.normpath((folder / name).parent / (folder / name).readlink()))
        etag = blob.name
        if not blob.is_file() or _is_stamped(blob) or _has_hash(blob, etag):
            continue
        if etag not in downloaded:
            raise SourceError(
                f"{name} of {repo} differs from its hash on the Hub, {etag}: it was damaged or changed after the "
                f"download: remove {blob} and run the same command again"
            )
        (folder / name).unlink()
        blob.unlink()
        raise SourceError(
            f"{name} of {repo} differs from its hash on the Hub, {etag}: the download was damaged: run the same "
            "command again"
        )


def _etags(blobs: Path) -> set[str]:
    return {path.name for path in blobs.iterdir()} if blobs.is_dir() else set()


def _has_hash(blob: Path, etag: str) -> bool:
    """Whether a file has the hash that its etag is. An etag in another form, as some mirrors have, is believed."""
    if re.fullmatch("[0-9a-f]{64}", etag):
        digest = hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", etag):
        digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size)
    else:
        return True
    with blob.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != etag:
        return False
    if blob.stat().st_size >= _LARGE:
        _stamp(blob)
    return True


def _stamp_path(blob: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "loftq" / "hashed" / blob.name


def _state(blob: Path) -> str:
    state = blob.stat()
    return f"{state.st_size} {state.st_mtime_ns}\n"


def _stamp(blob: Path) -> None:
    path = _stamp_path(blob)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, _state(blob))
    except OSError:  # without a stamp the file is hashed again by the next run
        return


def _is_stamped(blob: Path) -> bool:
    if blob.stat().st_size < _LARGE:
        return False
    try:
        return _stamp_path(blob).read_text(encoding="utf-8") == _state(blob)
    except (OSError, ValueError):
        return False
