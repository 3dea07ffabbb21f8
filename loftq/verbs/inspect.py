"""`loftq inspect`: shows the contents of an artifact or a trained adapter, from headers and configurations alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from loftq.artifacts.inspection import TRAINED, Inspection
from loftq.artifacts.quantized_linears import listed_linears
from loftq.collector import paused_collector
from loftq.core.codebooks import labels
from loftq.core.grid import ROW, Grid
from loftq.errors import ArtifactError, OptionError
from loftq.formats import adapter as adapters
from loftq.formats.adapter import Adapter, check_factors, read_config
from loftq.formats.artifact import MANIFEST, Artifact, read_artifact
from loftq.formats.layouts import LAYOUTS
from loftq.formats.links import refuse_links
from loftq.formats.schema import AGAIN, number, read_json, whole
from loftq.formats.tensor_files import TensorFiles, TensorPlace
from loftq.hub.names import find_folder, repository_of
from loftq.hub.repository import open_repository
from loftq.models.adapters import TRAINING_RECORD, TRAINING_SCHEMA

_RESULT = {"steps": whole(), "examples": whole(), "train_loss": (number(0), None), "evaluation": dict}
_SMALL = (MANIFEST, "config.json", adapters.CONFIG, f"{adapters.FOLDER}/{adapters.CONFIG}")


@dataclass(frozen=True)
class _Place:
    """A folder, or a commit on the Hub. `folder` holds its small files, `read` returns the header of another file."""

    name: str
    commit: str | None
    folder: Path
    files: Collection[str]
    read: Callable[[str], Mapping[str, TensorPlace]]

    def header(self, file: str) -> Mapping[str, TensorPlace]:
        """The places of the tensors of a safetensors file."""
        if file not in self.files:
            raise ArtifactError(f"{self.name} lacks {file}: `loftq verify` lists everything that is missing")
        return self.read(file)


@paused_collector()
def inspect(folder: str | Path, *, revision: str | None = None, token: str | None = None, worst: int = 5) -> Inspection:
    """Show the contents of a loftq folder, of the folder of a peft adapter, or of such a repository on the Hub.

    No weights are read or downloaded. From a repository, only the configurations and, by range requests, the headers of
    the safetensors files are read. `worst` is the number of layers to list with the largest error of outputs, or of
    weights if there was no calibration. Raises ArtifactError if the folder or repository is neither of these, or is
    damaged, and SourceError if it cannot be found.
    """
    if worst < 0:
        raise OptionError(f"--worst {worst}: expected 0 or more")
    place = _find(str(folder), revision, token)
    if MANIFEST in place.files:
        return _inspect_artifact(place, worst)
    if adapters.CONFIG in place.files:
        adapter = _adapter(place, "")
        base = {"model": adapter.config.get("base_model_name_or_path"), "task": adapter.config.get("task_type")}
        sizes = {"adapter": _bytes(place.header(adapters.WEIGHTS))}
        record = _training(place)
        return Inspection(
            place.name,
            TRAINED,
            place.commit,
            base,
            sizes,
            adapter=_described(adapter),
            training=record,
            versions=record.pop("versions", {}),
        )
    raise ArtifactError(
        f"{place.name} has neither a {MANIFEST} nor an {adapters.CONFIG}: expected a folder or repository that "
        "`loftq quantize` wrote, or one of a peft adapter"
    )


def _find(name: str, revision: str | None, token: str | None) -> _Place:
    folder = find_folder(name, revision)
    if folder is None:
        repository = open_repository(*repository_of(name, revision), token, _SMALL)
        return _Place(name, repository.commit, repository.folder, repository.files, cache(repository.header))
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    opened = TensorFiles(folder, ArtifactError, AGAIN)

    def read(file: str) -> Mapping[str, TensorPlace]:
        refuse_links(folder, [file], ArtifactError)
        return opened.places(file)

    return _Place(str(folder), None, folder, files, cache(read))


def _inspect_artifact(place: _Place, worst: int) -> Inspection:
    artifact = read_artifact(place.folder)
    manifest = artifact.manifest
    rows = manifest.get("layers") or []
    adapter_path = next(
        (path for path in (f"{adapters.FOLDER}/", "") if f"{path}{adapters.CONFIG}" in place.files), None
    )
    adapter = None if adapter_path is None else _adapter(place, adapter_path)
    tensors = _tensors(place, artifact)
    total = sum(int(entry["bytes"]) for entry in artifact.files.values())
    sizes = {"all files": total, "backbone": _bytes(tensors)}
    if adapter_path is not None:
        sizes["adapter"] = _bytes(place.header(f"{adapter_path}{adapters.WEIGHTS}"))
    types: list[dict[str, Any]] = []
    if rows and manifest.get("format") in LAYOUTS:
        linears = listed_linears(artifact)
        sizes["linears"] = _bytes({name: tensors[name] for name in linears.tensors(tensors)})
        types = list(_types(linears.grids, linears.shapes))
    return Inspection(
        name=place.name,
        kind=str(manifest["kind"]),
        commit=place.commit,
        source=manifest.get("source", {}),
        sizes=sizes,
        format=manifest.get("format"),
        types=types,
        adapter=None if adapter is None else _described(adapter),
        totals=manifest.get("totals", {}),
        worst=sorted(rows, key=_badness, reverse=True)[:worst] if manifest.get("totals") else [],
        settings=manifest["recipe"],
        versions=manifest.get("versions", {}),
        notes=manifest.get("notes", []),
    )


def _tensors(place: _Place, artifact: Artifact) -> dict[str, TensorPlace]:
    """The tensors of the backbone, in the files that the manifest lists."""
    tensors: dict[str, TensorPlace] = {}
    for file in artifact.files:
        if file.endswith(".safetensors") and Path(file).name != adapters.WEIGHTS:
            tensors |= place.header(file)
    return tensors


def _bytes(tensors: Mapping[str, TensorPlace]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _adapter(place: _Place, path: str) -> Adapter:
    folder = place.folder / path
    shapes = {name: tensor.shape for name, tensor in place.header(f"{path}{adapters.WEIGHTS}").items()}
    adapter = Adapter(folder, read_config(folder), shapes)
    check_factors(adapter)
    return adapter


def _training(place: _Place) -> dict[str, Any]:
    """What `training.json` says of a training: its data, its settings and its results; empty without such a file."""
    path = place.folder / TRAINING_RECORD
    if TRAINING_RECORD not in place.files or not path.is_file():
        return {}
    refuse_links(place.folder, [TRAINING_RECORD], ArtifactError)
    record = read_json(path, TRAINING_SCHEMA | {"versions?": {str: str}, "result?": _RESULT, "split?": dict})
    result = {name: value for name, value in record.get("result", {}).items() if name != "folder"}
    backbone = {name: value for name, value in record.get("backbone", {}).items() if name != "relative"}
    settings = {**record.get("settings", {}), **record.get("split", {})}
    return {
        "settings": settings,
        "rows": record.get("rows", {}),
        "result": result,
        "backbone": backbone,
        "versions": record.get("versions", {}),
    }


def _described(adapter: Adapter) -> dict[str, Any]:
    config = adapter.config
    return {
        "kind": adapter.kind,
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "rslora": bool(config.get("use_rslora")),
        "pool_size": adapter.pool_size,
        "target_modules": config.get("target_modules"),
        "target_parameters": config.get("target_parameters"),
        "modules_to_save": config.get("modules_to_save"),
        "layers": len(adapter.modules),
    }


def _types(grids: Mapping[str, Grid], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, Any]]:
    """The types of the layers, the most common one first. `bits` are the mean of all weights of a type."""
    names = labels(grid.codebook for grid in grids.values())
    layers: dict[str, list[str]] = {}
    for module, grid in grids.items():
        sharing = "one scale per row" if grid.block_size == ROW else f"{grid.sharing} {grid.block_size}"
        kind = str(grid).replace(grid.codebook, names[grid.codebook], 1)
        layers.setdefault(f"{kind}, {sharing}", []).append(module)
    for kind, modules in sorted(layers.items(), key=lambda item: -len(item[1])):  # stable
        counts = [prod(shapes[module]) for module in modules]
        bits = sum(grids[module].bits * count for module, count in zip(modules, counts, strict=True)) / sum(counts)
        yield {"type": kind, "bits": bits, "layers": len(modules), "weights": sum(counts)}


def _badness(row: Mapping[str, Any]) -> float:
    return float(row.get("output_error", row["error"]))
