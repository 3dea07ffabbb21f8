"""What artifacts have in them to be compared: the errors of their manifests, and the spectra of their adapters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from loftq.artifacts.rows import summed_errors
from loftq.core.solvers.methods import METHODS
from loftq.errors import ArtifactError
from loftq.formats.adapter import Adapter, open_adapter
from loftq.formats.artifact import Artifact, open_artifact

Row = Mapping[str, Any]
WEIGHTS, OUTPUTS = "", "output_"  # prefixes of the errors in a row


@dataclass(frozen=True)
class Place:
    """Where a layer is: its block, counted over all stacks of the model, and its name within the block."""

    depth: int
    kind: str


@dataclass(frozen=True)
class Measured:
    """One artifact: its label, its manifest, where each layer is, and the singular values of each layer's s·B·A."""

    label: str
    artifact: Artifact
    places: Mapping[str, Place]
    spectra: Mapping[str, torch.Tensor]

    @property
    def rows(self) -> Sequence[Row]:
        """Its layers."""
        found: Sequence[Row] = self.artifact.manifest["layers"]
        return found

    @property
    def totals(self) -> Mapping[str, Any]:
        """Its sums."""
        found: Mapping[str, Any] = self.artifact.manifest["totals"]
        return found

    @property
    def kinds(self) -> list[str]:
        """What layers are called within their blocks, in the model's order."""
        return list(dict.fromkeys(self.places[row["name"]].kind for row in self.rows))

    def has(self, prefix: str) -> bool:
        """Whether it has errors of weights, or of outputs."""
        return any(f"{prefix}error" in row for row in self.rows)

    def of_kind(self, kind: str, key: str) -> float | None:
        """An error of all layers of a kind together."""
        return _together((row for row in self.rows if self.places[row["name"]].kind == kind), key)

    def by_depth(self, key: str, kind: str | None = None) -> dict[int, float]:
        """An error of each block, of all its layers together or of those of a kind."""
        rows = [row for row in self.rows if kind in (None, self.places[row["name"]].kind) and key in row]
        depths = sorted({self.places[row["name"]].depth for row in rows})
        found = {d: _together((row for row in rows if self.places[row["name"]].depth == d), key) for d in depths}
        return {depth: error for depth, error in found.items() if error is not None}

    def trace(self, prefix: str) -> torch.Tensor:
        """What each layer has left of its plain error after 0, 1, … iterations: (layers, iterations + 1)."""
        rows = [row for row in self.rows if row.get(f"{prefix}plain_error")]
        longest = max((len(row[f"{prefix}iterations"]) for row in rows), default=0)
        shares = [_held(row, prefix, longest) for row in rows]
        return torch.tensor(shares, dtype=torch.float64).view(len(rows), longest + 1)

    def grid_of(self, key: str) -> dict[Place, Any]:
        """A value of the rows by the layers' places, where it is not the same everywhere."""
        found = {self.places[row["name"]]: row[key] for row in self.rows}
        return found if len(set(found.values())) > 1 else {}

    @cached_property
    def ranks(self) -> dict[Place, int]:
        """The rank of every layer's adapter, where it is not the same everywhere."""
        found = {self.places[name]: len(values) for name, values in self.spectra.items()}
        return found if len(set(found.values())) > 1 else {}

    def captured(self, kind: str | None = None) -> torch.Tensor:
        """‖first i singular values of s·B·A‖² of ‖s·B·A‖² + ‖W − Q − s·B·A‖²: (layers, rank + 1), of a kind or all."""
        longest = max(len(values) for values in self.spectra.values())
        shares = []
        for row in self.rows:
            if kind not in (None, self.places[row["name"]].kind):
                continue
            squares = torch.zeros(longest + 1, dtype=torch.float64)
            values = self.spectra[row["name"]]
            squares[1 : len(values) + 1] = values.double().square()
            left = (row["error"] * row["weight_norm"]) ** 2
            shares.append(squares.cumsum(0) / (squares.sum() + left or 1.0))
        return torch.stack(shares)


def measure(folders: Iterable[str | Path]) -> list[Measured]:
    """Read artifacts to compare. Raises ArtifactError for folders that are none, or have no errors of layers."""
    artifacts = [open_artifact(folder) for folder in folders]
    for artifact in artifacts:
        if not artifact.manifest.get("layers") or "totals" not in artifact.manifest:
            kind = artifact.manifest["kind"]
            raise ArtifactError(f"{artifact.folder} is a {kind} folder, which has no errors of layers to report")
    labels = _labels(artifacts)
    found = []
    for artifact, label in zip(artifacts, labels, strict=True):
        adapter, names = open_adapter(artifact.adapter), [row["name"] for row in artifact.manifest["layers"]]
        spectra = {name: _spectrum(adapter, name) for name in names}
        found.append(Measured(label, artifact, places(names), spectra))
    return found


def places(names: Sequence[str]) -> dict[str, Place]:
    """Where modules are, by their names: `decoder.layers.3.mlp.up_proj` is `up_proj` in a block of its own.

    Kinds are the shortest ends of names that tell them apart.
    """
    parts = {name: re.fullmatch(r"(.*?\.\d+)\.(.*)", name) for name in names}
    blocks = {name: found[1] if found else "" for name, found in parts.items()}
    rests = {name: re.sub(r"\.\d+(?=\.|$)", "", found[2] if found else name) for name, found in parts.items()}
    order = {block: depth for depth, block in enumerate(dict.fromkeys(blocks.values()))}
    kinds = set(rests.values())
    return {name: Place(order[blocks[name]], _shortest(rests[name], kinds)) for name in names}


def _shortest(name: str, all_names: Iterable[str]) -> str:
    parts, others = name.split("."), [other.split(".") for other in all_names if other != name]
    lengths = range(1, len(parts) + 1)
    return next((".".join(parts[-n:]) for n in lengths if all(other[-n:] != parts[-n:] for other in others)), name)


def _together(rows: Iterable[Row], key: str) -> float | None:
    return summed_errors([row for row in rows if key in row]).get(key)


def _held(row: Row, prefix: str, length: int) -> list[float]:
    """The error after each iteration, in units of the plain one; the last is held."""
    errors = [row[f"{prefix}plain_error"], *row[f"{prefix}iterations"]]
    shares = [error / errors[0] for error in errors]
    return [*shares, *[shares[-1]] * (length + 1 - len(shares))]


def _spectrum(adapter: Adapter, module: str) -> torch.Tensor:
    """The singular values of s·B·A, by way of the small factors' own."""
    a, b = adapter.factors(module)
    core = torch.linalg.qr(b).R @ torch.linalg.qr(a.t()).R.t()
    values: torch.Tensor = adapter.scaling * torch.linalg.svdvals(core)
    if adapter.pool_size is None:
        return values
    values *= a.shape[1] / adapter.pool_size * adapter.pool_size**0.5  # of pools, spread over their inputs
    return values


def _labels(artifacts: Sequence[Artifact]) -> list[str]:
    """What tells artifacts apart: type, rank, method; and their folders' names where those do not."""
    labels = [_label(artifact.manifest) for artifact in artifacts]
    counts = Counter(labels)
    return [
        label if counts[label] == 1 else f"{label} ({artifact.folder.resolve().name})"
        for label, artifact in zip(labels, artifacts, strict=True)
    ]


def _label(manifest: Mapping[str, Any]) -> str:
    recipe = manifest["recipe"]
    kinds = {row["codebook"].upper() for row in manifest["layers"]}
    kind = kinds.pop() if len(kinds) == 1 else f"{recipe['bits']} bits"
    name = str(recipe.get("method"))
    method = METHODS[name].title if name in METHODS else name
    if recipe["adapter"] == "qalora":
        method = "QA-LoRA"
    elif not recipe["iters"]:
        method = "QLoRA"
    return f"{kind}, rank {recipe['rank']}, {method}"
