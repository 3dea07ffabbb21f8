"""The folder of a trained adapter as the only name that a command needs: it knows the backbone that it belongs to.

peft's `adapter_config.json` names the backbone, and `training.json` also holds the way from one folder to the other,
which still leads there after both were moved together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from loftq.errors import ArtifactError, OptionError
from loftq.formats.adapter import CONFIG, FOLDER, WEIGHTS, read_config
from loftq.formats.artifact import MANIFEST, open_artifact
from loftq.formats.model_config import FILE
from loftq.hub.folder import fetch_adapter, is_adapter_repository
from loftq.models.adapters import TRAINING_RECORD, training_record


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter in peft's format, and no model."""
    return all((folder / name).is_file() for name in (CONFIG, WEIGHTS)) and not (folder / FILE).is_file()


def with_backbone(name: str, adapter: str | None = None) -> tuple[str, str | None]:
    """The name of a backbone, and the folder of its adapter, from the name of either, here or on the Hub.

    A name that is not an adapter's is returned as it is. Raises OptionError if two adapters are named, ArtifactError
    for an adapter whose backbone is not found, and SourceError for one that cannot be downloaded.
    """
    folder = Path(name).expanduser()
    if adapter is None and not folder.is_dir() and is_adapter_repository(name):
        folder = fetch_adapter(name)
    if not is_adapter_folder(folder) and not (folder / FILE).is_file() and is_adapter_folder(folder / FOLDER):
        folder = folder / FOLDER  # the adapter that `loftq quantize --backbone` made
    if not is_adapter_folder(folder):
        if (folder / TRAINING_RECORD).is_file():
            raise ArtifactError(
                f"{folder} holds a training that is not finished: finish it with `loftq train ... --resume`, or name "
                "one of its checkpoints"
            )
        return name, None if adapter is None else str(fetch_adapter(adapter))
    if adapter is not None:
        raise OptionError(
            f"--adapter {adapter}: {name} is the folder of an adapter too: leave the option out, or name the backbone "
            f"in the place of {name}"
        )
    return backbone_name(folder), str(folder)


def backbone_name(folder: Path) -> str:
    """The folder of the backbone of an adapter, or its id on the Hub. Raises ArtifactError if it is not found."""
    config = read_config(folder)
    base = str(config.get("base_model_name_or_path") or "")
    record = training_record(folder) or {}
    candidates = list(_candidates(base, record))
    folders = [path for path in candidates if path.is_dir()]
    fitting = [path for path in folders if _hash_of(path) in (None, record.get("sha256"))]
    if folders:
        return str((fitting or folders)[0])
    if base and not base.startswith((".", "/", "~")) and base.count("/") <= 1:
        return f"{base}@{config['revision']}" if config.get("revision") else base
    looked = f" (looked for: {', '.join(map(str, candidates))})" if candidates else ""
    raise ArtifactError(
        f"{folder} is an adapter whose backbone is not found{looked}: name the backbone, and give this folder with "
        "--adapter"
    )


def way_to(backbone: Path, folder: Path) -> str:
    """The relative path from the folder of an adapter to its backbone, for `training.json`."""
    return Path(os.path.relpath(backbone.resolve(), folder.resolve())).as_posix()


def _candidates(base: str, record: dict[str, str]) -> Iterator[Path]:
    """The folders in which the backbone may be, the likeliest first, each once."""
    found = [Path(name).expanduser() for name in (base, record.get("model", "")) if name]
    if "relative" in record:
        found.append((Path(record["folder"]) / record["relative"]).resolve())
    yield from dict.fromkeys(found)


def _hash_of(folder: Path) -> str | None:
    """The recorded hash of a backbone that `loftq quantize` wrote; None for any other folder."""
    return open_artifact(folder).backbone_hash if (folder / MANIFEST).is_file() else None
