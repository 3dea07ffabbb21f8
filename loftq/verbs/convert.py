"""`loftq convert`: writes a folder in another format that has the same codes, without solving again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.artifacts.backbone import Backbone, backbone_of
from loftq.artifacts.card_section import read_card, replace_marked
from loftq.artifacts.loading_snippet import loading_section
from loftq.artifacts.staging import Staging, check_output, open_staging
from loftq.core.codebooks import listing
from loftq.display import key_values, size
from loftq.errors import ArtifactError, OptionError, UnknownNameError
from loftq.formats.adapter import CONFIG, FOLDER, read_config
from loftq.formats.artifact import CARD, MANIFEST, SAME_CODES, Artifact, combine_hashes, open_artifact
from loftq.formats.checkpoint import Shard, TensorSpec, lay_out
from loftq.formats.disk import explain_os_errors
from loftq.formats.layouts import LAYOUTS
from loftq.formats.model_config import config_text
from loftq.formats.schema import json_text
from loftq.formats.shard_writer import ShardWriter
from loftq.formats.space import check_space
from loftq.models.merged import WITH_ADAPTER
from loftq.settings import plain

_WEIGHTS = ".safetensors"
_SKIPPED = "llm_int8_skip_modules"
Groups = Mapping[str, list[str]]  # the tensors of a file, by the module that they belong to, or by their own name


@dataclass(frozen=True)
class Conversion:
    """The folder that was written, its format, and the bytes of its backbone."""

    folder: Path
    format: str
    nbytes: int

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {"folder": str(self.folder), "format": self.format, "bytes": self.nbytes}

    def table(self) -> str:
        """The result, for a person."""
        return key_values([("folder", str(self.folder)), ("format", self.format), ("backbone", size(self.nbytes))])


def convert(folder: str | Path, *, format: str, output: str | Path, overwrite: bool = False) -> Conversion:
    """Write a folder of `loftq quantize` in another format that has the same codes and scales, with its adapter.

    The weights, their configuration and the adapter are those that `loftq quantize --format` of the same settings
    writes. One linear is in memory at a time. Raises ArtifactError for a folder that has no such codes, OptionError for
    a format that stores them differently, and OutputError if the output exists already.
    """
    artifact, out = open_artifact(folder), Path(output).expanduser()
    _check(artifact, format)
    check_output(out, resume=False, overwrite=overwrite)
    backbone = backbone_of(artifact)
    with explain_os_errors(out):
        check_space(out, sum(int(entry["bytes"]) for entry in artifact.files.values()))
    with open_staging(out, {"convert": artifact.backbone_hash, "format": format}, overwrite=True) as staging:
        _write(artifact, backbone, format, staging)
        staging.publish()
    files = open_artifact(out).files
    return Conversion(out, format, sum(files[name]["bytes"] for name in files if _is_backbone(name)))


def _check(artifact: Artifact, format: str) -> None:
    """Raise unless the folder can be written in the format."""
    folder, manifest = artifact.folder, artifact.manifest
    if format not in LAYOUTS:
        raise UnknownNameError("format", format, LAYOUTS)
    if manifest["kind"] not in WITH_ADAPTER:
        raise ArtifactError(f"{folder} is a {manifest['kind']} folder: expected one that `loftq quantize` wrote")
    old = LAYOUTS[manifest["format"]]
    alike = [name for name, layout in LAYOUTS.items() if layout.METHOD == old.METHOD and layout is not old]
    if format not in alike:
        why = f"has the codes of {manifest['format']} in the same form: expected {' or '.join(alike)}"
        raise OptionError(
            f"--format {format}: {folder} is in the format {manifest['format']}, and "
            + (f"only another format {why}" if alike else "no other format has its codes: quantize the model again")
        )
    backbone = backbone_of(artifact)
    lacking = next((module for module, grid in backbone.grids.items() if not LAYOUTS[format].holds(grid)), None)
    if lacking is not None:
        raise OptionError(f"--format {format} cannot hold {backbone.grids[lacking]} ({lacking})")


def _is_backbone(name: str) -> bool:
    return name.endswith(_WEIGHTS) and "/" not in name


def _write(artifact: Artifact, backbone: Backbone, format: str, staging: Staging) -> None:
    places: dict[str, Groups] = {name: _groups(backbone, name) for name in artifact.files if _is_backbone(name)}
    shards = [_shard(backbone, format, file, groups) for file, groups in places.items()]
    for name in artifact.files:
        if name in places:
            continue
        staging.copy(artifact.folder / name, name)
    config = backbone.config
    entry = LAYOUTS[format].quantization_config(
        next(iter(backbone.grids.values())), backbone.dtype, config["quantization_config"][_SKIPPED], {}, (), ()
    )
    staging.write_text("config.json", config_text({**config, "quantization_config": entry}))
    adapter = {**read_config(artifact.adapter), "base_model_name_or_path": str(staging.output.resolve())}
    staging.write_text(f"{FOLDER}/{CONFIG}", json_text(adapter, indent=2, sort_keys=True) + "\n")
    with staging.writing(shards) as writer:
        for groups in places.values():
            for owner, names in groups.items():
                staging.note(owner, {"written": _copy(backbone, format, owner, names, writer)})
    _write_manifest(artifact, format, staging, shards)


def _groups(backbone: Backbone, file: str) -> Groups:
    groups: dict[str, list[str]] = {}
    for name, found in backbone.checkpoint.files.items():
        if found == file:
            groups.setdefault(backbone.owners.get(name, name), []).append(name)
    return groups


def _shard(backbone: Backbone, format: str, file: str, groups: Groups) -> Shard:
    specs: list[TensorSpec] = []
    for owner, names in groups.items():
        if owner in backbone.grids:
            grid, shape = backbone.grids[owner], backbone.shapes[owner]
            specs += LAYOUTS[format].specs(owner, shape, grid, backbone.dtype)
        else:
            specs += [backbone.checkpoint.tensors[name] for name in names]
    return lay_out([specs], sum(spec.nbytes for spec in specs), file)[0]


def _copy(backbone: Backbone, format: str, owner: str, names: list[str], writer: ShardWriter) -> dict[str, str]:
    """Write the tensors of a module in the new format, or a tensor as it is. Returns their hashes."""
    if owner not in backbone.grids:
        return {name: writer.write(name, backbone.checkpoint.read(name)) for name in names}
    grid, shape = backbone.grids[owner], backbone.shapes[owner]
    tensors = LAYOUTS[format].tensors(owner, shape, grid, backbone.dtype, *backbone.read(owner))
    return {name: writer.write(name, tensor) for name, tensor in tensors.items()}


def _write_manifest(artifact: Artifact, format: str, staging: Staging, shards: list[Shard]) -> None:
    manifest = plain(artifact.manifest)
    old, new = LAYOUTS[manifest["format"]], LAYOUTS[format]
    names = listing(row["codebook"] for row in manifest["layers"])
    told = [layout.PLAN_NOTE.format(what=names, loader=f"load_{manifest['kind']}") for layout in (old, new)]
    notes = [note for note in manifest.get("notes", []) if note != told[0]] + [told[1]] * bool(told[1])
    earlier = [*manifest.get(SAME_CODES, []), artifact.backbone_hash]
    manifest |= {
        SAME_CODES: sorted(set(earlier)),
        "format": format,
        "notes": notes,
        "recipe": {**manifest["recipe"], "format": format},
    }
    card = read_card(artifact.folder / CARD).replace(f"\n- {artifact.manifest['format']}\n", f"\n- {format}\n", 1)
    staging.write_text(CARD, replace_marked(card, loading_section(manifest)))
    files, zero_blocks = staging.describe()
    hashes = {shard.file: files[shard.file]["sha256"] for shard in shards}
    manifest["totals"]["backbone_bytes"] = sum(files[shard.file]["bytes"] for shard in shards)
    manifest |= {"files": files, "zero_blocks": zero_blocks, "backbone_sha256": combine_hashes(hashes)}
    staging.write_text(MANIFEST, json_text(manifest, indent=1, sort_keys=True) + "\n")
