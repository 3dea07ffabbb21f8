"""The whole folder MODEL_DIR: a backbone, its adapter, and the manifest `loftq.json`, which is written last.

A folder with a `loftq.json` is complete. The manifest lists every file with its size and hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.core.codebooks import CODEBOOKS, ROW, TYPES, ZERO_POINTS
from loftq.errors import ArtifactError
from loftq.formats import adapter
from loftq.formats.disk import is_inside
from loftq.formats.layouts import LAYOUTS
from loftq.formats.links import refuse_links
from loftq.formats.model_files import model_file_names
from loftq.formats.schema import Limited, check_value, number, one_of, read_json, whole

MANIFEST = "loftq.json"
CARD = "README.md"  # the user may edit it
VERSION = 1
START = "start"  # the kind of an adapter for a backbone that another program quantized
SAME_CODES = "same_codes"  # the hashes of backbones in other formats from which this one was converted
DENSE = "dense"  # the format of a merged model in 16 bits

_AGAIN = "copy or download the folder again"
_ERROR = number(0)
_BLOCK = Limited(
    f"a positive whole number, {ROW} or null", lambda v: v is None or (type(v) is int and (v > 0 or v == ROW))
)
_SHAPE = Limited(
    "two or three positive whole numbers",
    lambda v: isinstance(v, list) and len(v) in (2, 3) and all(type(side) is int and 0 < side < 2**40 for side in v),
)
_SHARING = {  # the number of weights that share a scale, and their type
    "block_size": _BLOCK,
    "group_size": _BLOCK,
    "zero_point": (None, one_of(ZERO_POINTS)),
    "double_quant": bool,
    "compute_dtype": one_of(("bfloat16", "float16", "float32")),
}
_RECIPE = {
    **_SHARING,
    "bits": number(above=0, most=32),
    "quant_type": one_of(TYPES),
    "adapter": str,
    "rank": whole(1),
    "alpha": number(above=0),
    "expert_bits?": (number(above=0, most=32), None),
    "expert_rank?": (whole(1), None),
    "rslora": bool,
    "iters": whole(),
    "calibration": (str, None),
    "num_labels": (whole(1), None),
    "pool_size?": (whole(1), None),
    "method?": (str, None),
    "seed?": whole(),
}
_PLAIN_ROW = {"name": str, "shape": _SHAPE, "codebook": one_of(CODEBOOKS)}
_OUTPUT_ERRORS = ("output_plain_error", "output_refit_error", "output_error")
_ROW = {
    **_PLAIN_ROW,
    "bits_per_weight": number(0),
    **dict.fromkeys(("weight_norm", "plain_error", "error"), _ERROR),
    **dict.fromkeys((f"{name}?" for name in ("refit_error", *_OUTPUT_ERRORS)), _ERROR),
    "kept_iteration": whole(),
    "iterations": [_ERROR],
    "output_iterations?": [_ERROR],
}
_SIZES = ("layers", "weights", "source_bytes", "backbone_bytes", "adapter_bytes")
_TOTALS = {
    **dict.fromkeys(_SIZES, whole()),
    "expert_bytes?": whole(),
    **dict.fromkeys(("bits_per_weight", "plain_error", "error"), _ERROR),
    **dict.fromkeys(
        (f"{name}?" for name in ("refit_error", *_OUTPUT_ERRORS, "divergence", "divergence_before")), _ERROR
    ),
}
_SOURCE = {"model": str, "model_type?": str, "task": str, "revision?": (str, None), "sha256?": str, "target?": str}
_MADE_OF = {**_SOURCE, "base?": (str, None), "original?": (str, None), "adapter?": (str, None), "rank?": whole(1)}
_COMMON = {
    "kind": str,
    "format?": str,
    "backbone_sha256": str,
    "versions?": {str: str},
    "notes?": [str],
    f"{SAME_CODES}?": [str],
    "files": {str: {"bytes": whole(), "sha256?": str}},
}
_QUANTIZED = {
    **_COMMON,
    "format": one_of(LAYOUTS),
    "source": {**_SOURCE, "model_type": str, "revision": (str, None)},
    "recipe": _RECIPE,
    "layers": [_ROW],
    "totals": _TOTALS,
    "calibration?": (dict, None),
}
_MERGED = {**_COMMON, "format": str, "source": _MADE_OF, "recipe": _SHARING, "layers": [_PLAIN_ROW]}
_SCHEMAS = {"qlora": _QUANTIZED, "qalora": _QUANTIZED, "merged": _MERGED}  # other kinds have no layers
_OTHER = {
    **_COMMON,
    "source?": {key.rstrip("?") + "?": kind for key, kind in _MADE_OF.items()},
    "recipe": dict,
    "layers?": [dict],
    "totals?": dict,
}


@dataclass(frozen=True)
class Artifact:
    """A complete loftq folder and the contents of its manifest."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def adapter(self) -> Path:
        """The folder of the initial adapter."""
        return self.folder / adapter.FOLDER

    @property
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """The size in bytes and the SHA-256 of every file, by its name relative to the folder."""
        files: Mapping[str, Mapping[str, Any]] = self.manifest["files"]
        return files

    @property
    def backbone_hash(self) -> str:
        """The hash of the quantized backbone. An adapter belongs to exactly one backbone."""
        return str(self.manifest["backbone_sha256"])

    def has_codes_of(self, backbone_hash: str) -> bool:
        """Whether an adapter of the backbone with this hash fits: it is this one, or was converted into this one."""
        return backbone_hash in (self.backbone_hash, *self.manifest.get(SAME_CODES, ()))


def open_artifact(folder: Path | str) -> Artifact:
    """Open a loftq folder. Raises ArtifactError if it is not one, is incomplete, or has a newer version."""
    artifact = read_artifact(folder)
    refuse_links(artifact.folder, [*artifact.files, *_read_names(artifact)], ArtifactError)
    for name, entry in artifact.files.items():
        if not is_inside(name):
            raise ArtifactError(f"{artifact.folder / MANIFEST} lists {name!r}, which lies outside its folder")
        path = artifact.folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: {MANIFEST} lists it")
        nbytes, expected = path.stat().st_size, int(entry["bytes"])
        if name.endswith(".safetensors") and nbytes != expected:
            raise ArtifactError(f"{path} has {nbytes} bytes, expected {expected}: copy or download it again")
    return artifact


def _read_names(artifact: Artifact) -> Iterator[str]:
    """The names of files that libraries read when they open a folder and its adapter, listed or not."""
    yield from model_file_names(artifact.folder)
    if artifact.adapter.is_dir():
        yield from (f"{adapter.FOLDER}/{name}" for name in model_file_names(artifact.adapter))


def read_artifact(folder: Path | str) -> Artifact:
    """A loftq folder, of which only the manifest is read and checked. Raises ArtifactError."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder: expected one that `loftq quantize` wrote")
    if not path.is_file() and _is_dense(folder) and (folder / adapter.FOLDER / adapter.CONFIG).is_file():
        raise ArtifactError(
            f"{folder} has no {MANIFEST}, but an adapter in {adapter.FOLDER}: if the original LoftQ script wrote it, "
            f"`loftq quantize {folder}` makes a loftq folder of it and keeps its adapter"
        )
    if not path.is_file():
        raise ArtifactError(
            f"{folder} has no {MANIFEST}: it is not a loftq folder, or the run that wrote it was interrupted "
            "(`loftq quantize ... --resume` finishes it)"
        )
    refuse_links(folder, [MANIFEST], ArtifactError)
    return Artifact(folder, read_manifest(path))


def _is_dense(folder: Path) -> bool:
    """Whether a folder holds a model that is not quantized."""
    config = folder / "config.json"
    return config.is_file() and not read_json(config, {}, foreign=True).get("quantization_config")


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest that has all entries that readers need. Raises ArtifactError."""
    heading = {"format_version": whole(1)}
    manifest: dict[str, Any] = read_json(path, heading, advice=_AGAIN)
    if manifest["format_version"] > VERSION:
        raise ArtifactError(
            f"{path} has format version {manifest['format_version']}, this loftq reads up to version {VERSION}: "
            "upgrade loftq"
        )
    check_value(manifest, {"kind": str}, path, advice=_AGAIN)
    check_value(manifest, _SCHEMAS.get(manifest["kind"], _OTHER), path, advice=_AGAIN)
    return manifest


def refuse_start(artifact: Artifact) -> None:
    """Raise ArtifactError for the folder of an adapter whose backbone is another program's."""
    if artifact.manifest["kind"] != START:
        return
    base = artifact.manifest.get("backbone", {}).get("model", "its backbone")
    line = f'PeftModel.from_pretrained(base, "{artifact.folder}", subfolder="{adapter.FOLDER}")'
    raise ArtifactError(
        f"{artifact.folder} is an adapter for {base}, which loftq did not write: load that model with transformers, "
        f"and the adapter with peft ({line})"
    )


def combine_hashes(hashes: Mapping[str, str]) -> str:
    """A single SHA-256 for named parts. It does not depend on their order."""
    lines = "".join(f"{name} {value}\n" for name, value in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
