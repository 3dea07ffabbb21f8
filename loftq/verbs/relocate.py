"""`loftq relocate`: names the present place of a backbone in its adapter's configuration, after folders were moved.

Libraries that open an adapter's folder alone (`AutoModel`, `pipeline`, `AutoPeftModel`) find the backbone by
`base_model_name_or_path`. peft and transformers read a relative path there from the folder in which a program was
started, not from the adapter's, so only a full path works from anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.display import key_values
from loftq.errors import ArtifactError, OptionError
from loftq.formats.adapter import CONFIG, FOLDER, read_config
from loftq.formats.artifact import MANIFEST, Artifact, open_artifact
from loftq.formats.disk import explain_os_errors, write_whole
from loftq.formats.scan import hash_of
from loftq.formats.schema import json_text
from loftq.models.adapters import check_adapter
from loftq.models.merged import WITH_ADAPTER
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

    `folder` is one that `loftq quantize` wrote: then its own adapter names it. Or it is the folder of another adapter,
    such as a trained one, whose backbone is `backbone`, or the one that it finds by itself. A `loftq.json` has the new
    hash. Raises ArtifactError if the folder is neither, or the adapter belongs to another backbone, and OptionError if
    the backbone is not a folder.
    """
    folder = Path(folder).expanduser()
    with explain_os_errors(folder, option="folder"):
        adapter = folder if is_adapter_folder(folder) else folder / FOLDER
        if not is_adapter_folder(adapter):
            kind = open_artifact(folder).manifest["kind"]
            raise ArtifactError(f"{folder} is a {kind} folder without an adapter: nothing in it names a place")
        artifact = _listing(adapter)
        if artifact is not None and artifact.manifest["kind"] in WITH_ADAPTER:
            if backbone is not None:
                raise OptionError(f"--backbone {backbone}: {adapter} belongs to {artifact.folder}: leave it out")
            return _point(adapter, artifact.folder.resolve(), artifact)
        target = _found(adapter) if backbone is None else _named(adapter, Path(backbone).expanduser())
        return _point(adapter, target, artifact)


def _listing(adapter: Path) -> Artifact | None:
    """The folder whose `loftq.json` lists the configuration of an adapter; None if there is none."""
    root = adapter.parent if adapter.name == FOLDER else adapter
    artifact = open_artifact(root) if (root / MANIFEST).is_file() else None
    return artifact if artifact is not None and _name_in(artifact, adapter) in artifact.files else None


def _name_in(artifact: Artifact, adapter: Path) -> str:
    return (adapter / CONFIG).relative_to(artifact.folder).as_posix()


def _point(adapter: Path, backbone: Path, artifact: Artifact | None) -> Relocation:
    """Write the place of the backbone, and the hash of the configuration where one is listed."""
    config, path = read_config(adapter), adapter / CONFIG
    before = config.get(_KEY)
    if before != str(backbone):
        if artifact is not None and hash_of(path) != artifact.files[_name_in(artifact, adapter)].get("sha256"):
            raise ArtifactError(f"{path} differs from its hash in {MANIFEST}: copy or download it again")
        write_whole(path, json_text({**config, _KEY: str(backbone)}, indent=2, sort_keys=True) + "\n")
    if artifact is not None:
        manifest = plain(artifact.manifest)
        given = manifest.get("backbone", {})  # of an adapter for a backbone of others
        if given.get("model") == before:
            given["model"] = str(backbone)
        manifest["files"][_name_in(artifact, adapter)] = {"bytes": path.stat().st_size, "sha256": hash_of(path)}
        write_whole(artifact.folder / MANIFEST, json_text(manifest, indent=1, sort_keys=True) + "\n")
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
