"""`loftq relocate`: names the present place of a backbone in its adapter's configuration, after folders were moved.

Libraries that open an adapter's folder alone (`AutoModel`, `pipeline`, `AutoPeftModel`) find the backbone by
`base_model_name_or_path`. peft and transformers read a relative path there from the folder in which a program was
started, not from the adapter's, so only a full path works from anywhere.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.display import key_values
from loftq.errors import ArtifactError, OptionError
from loftq.formats.adapter import CONFIG, FOLDER, read_config
from loftq.formats.artifact import MANIFEST, Artifact, open_artifact
from loftq.formats.disk import explain_os_errors, write_whole
from loftq.formats.schema import json_text
from loftq.models.adapters import check_adapter
from loftq.models.trained_folder import backbone_name, is_adapter_folder
from loftq.settings import plain

_KEY = "base_model_name_or_path"


@dataclass(frozen=True)
class Relocation:
    """The adapter whose configuration names its backbone again. `before` is what it named until now."""

    adapter: Path
    backbone: Path
    before: str | None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {"adapter": str(self.adapter), "backbone": str(self.backbone), "before": self.before}

    def table(self) -> str:
        """The places, for a person."""
        same = self.before == str(self.backbone)
        rows = [("adapter", str(self.adapter)), ("backbone", f"{self.backbone}{', as before' if same else ''}")]
        return key_values([*rows, *([] if same else [("before", self.before or "not named")])])


def relocate(folder: str | Path, *, backbone: str | Path | None = None) -> Relocation:
    """Write the full path of a backbone into its adapter's configuration.

    `folder` is one that `loftq quantize` wrote: then its own adapter names it, and `loftq.json` has the new hash. Or it
    is the folder of a trained adapter, whose backbone is `backbone`, or the one that it finds by itself. Raises
    ArtifactError if the folder is neither, or the adapter belongs to another backbone, and OptionError if the backbone
    is not a folder.
    """
    folder = Path(folder).expanduser()
    with explain_os_errors(folder, option="folder"):
        if folder.name == FOLDER and (folder.parent / MANIFEST).is_file():
            folder = folder.parent
        elif is_adapter_folder(folder):
            return _point(folder, _found(folder) if backbone is None else _named(folder, Path(backbone).expanduser()))
        if backbone is not None:
            raise OptionError(f"--backbone {backbone}: the adapter of {folder} belongs to {folder}: leave it out")
        return _within(open_artifact(folder))


def _within(artifact: Artifact) -> Relocation:
    """Let the initial adapter of a folder name this folder."""
    name = f"{FOLDER}/{CONFIG}"
    if name not in artifact.files:
        raise ArtifactError(f"{artifact.folder} has no adapter in {FOLDER}: nothing in it names a place")
    target, config = str(artifact.folder.resolve()), artifact.adapter / CONFIG
    recorded = artifact.files[name].get("sha256")
    if read_config(artifact.adapter).get(_KEY) != target and _hash(config.read_bytes()) != recorded:
        raise ArtifactError(f"{config} differs from its hash in {MANIFEST}: copy or download it again")
    done = _point(artifact.adapter, artifact.folder.resolve())
    content = config.read_bytes()
    manifest = plain(artifact.manifest)
    manifest["files"][name] = {"bytes": len(content), "sha256": _hash(content)}
    write_whole(artifact.folder / MANIFEST, json_text(manifest, indent=1, sort_keys=True) + "\n")
    return done


def _point(adapter: Path, backbone: Path) -> Relocation:
    config = read_config(adapter)
    before = config.get(_KEY)
    if before != str(backbone):
        text = json_text({**config, _KEY: str(backbone)}, indent=2, sort_keys=True) + "\n"
        write_whole(adapter / CONFIG, text)
    return Relocation(adapter, backbone, before)


def _found(adapter: Path) -> Path:
    """The backbone that the folder of an adapter finds by itself."""
    name = backbone_name(adapter)
    if not Path(name).is_dir():
        raise OptionError(f"{adapter} belongs to {name} on the Hub: name a folder of it with --backbone")
    return _named(adapter, Path(name))


def _named(adapter: Path, backbone: Path) -> Path:
    if not backbone.is_dir():
        raise OptionError(f"--backbone {backbone} is not a folder: name the folder of the backbone")
    if (backbone / MANIFEST).is_file():
        check_adapter(open_artifact(backbone), adapter)
    return backbone.resolve()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
