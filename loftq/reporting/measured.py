"""The values of artifacts that a report compares: the errors in their manifests, and the spectra of their adapters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from loftq.artifacts.rows import summed_errors
from loftq.core.codebooks import CODEBOOKS
from loftq.display import visible
from loftq.errors import ArtifactError
from loftq.formats.adapter import Adapter, open_adapter
from loftq.formats.artifact import Artifact, open_artifact
from loftq.models.merged import WITH_ADAPTER
from loftq.planning.method_names import title_of
from loftq.reporting.sweep_record import read_sweep

Row = Mapping[str, Any]
WEIGHTS, OUTPUTS = "", "output_"  # prefixes of the errors in a row
_TYPES = 6  # that a chart tells apart


@dataclass(frozen=True)
class Place:
    """The place of a layer: its block, counted over all stacks of the model, and its name within the block."""

    depth: int
    kind: str


@dataclass(frozen=True)
class Measured:
    """An artifact with its label, and the place and the singular values of s·B·A of each layer.

    `series` is the number of its color: artifacts of several widths that are alike apart from the width share it.
    `perplexity` are those that a sweep has measured: full precision, start, trained.
    """

    label: str
    artifact: Artifact
    places: Mapping[str, Place]
    spectra: Mapping[str, torch.Tensor]
    series: int = 0
    perplexity: Mapping[str, float] = field(default_factory=dict)

    @property
    def width(self) -> str:
        """The width of its codes, such as NF4: the first part of its label."""
        return self.label.partition(", ")[0]

    @property
    def name(self) -> str:
        """Its label without the width."""
        return self.label.partition(", ")[2]

    @property
    def folder(self) -> str:
        """The name of its folder, without the folders above it."""
        return visible(self.artifact.folder.resolve().name)

    @property
    def rows(self) -> Sequence[Row]:
        """The rows of its layers in the manifest."""
        rows: Sequence[Row] = self.artifact.manifest["layers"]
        return rows

    @property
    def totals(self) -> Mapping[str, Any]:
        """The totals in the manifest."""
        totals: Mapping[str, Any] = self.artifact.manifest["totals"]
        return totals

    @property
    def kinds(self) -> list[str]:
        """The names of layers within their blocks, in the order of the model."""
        return list(dict.fromkeys(self.places[row["name"]].kind for row in self.rows))

    def has(self, prefix: str) -> bool:
        """Whether it has errors of weights (WEIGHTS), or of outputs (OUTPUTS)."""
        return any(f"{prefix}error" in row for row in self.rows)

    @property
    def worst_first(self) -> list[Row]:
        """The rows by falling error: of outputs, or of weights for a layer whose inputs are not known."""
        return sorted(self.rows, key=lambda row: row.get(f"{OUTPUTS}error", row["error"]), reverse=True)

    def of_kind(self, kind: str, key: str) -> float | None:
        """The total error of all layers of a kind."""
        return _together((row for row in self.rows if self.places[row["name"]].kind == kind), key)

    def by_depth(self, key: str, kind: str | None = None) -> dict[int, float]:
        """The total error of each block, over all of its layers or those of a kind."""
        blocks: dict[int, list[Row]] = {}
        for row in self.rows:
            place = self.places[row["name"]]
            if kind in (None, place.kind) and key in row:
                blocks.setdefault(place.depth, []).append(row)
        errors = {depth: _together(blocks[depth], key) for depth in sorted(blocks)}
        return {depth: error for depth, error in errors.items() if error is not None}

    def trace(self, prefix: str) -> torch.Tensor:
        """The error of each layer after 0, 1, … iterations, relative to plain rounding: (layers, iterations + 1)."""
        rows = [row for row in self.rows if row.get(f"{prefix}plain_error")]
        longest = max((len(row[f"{prefix}iterations"]) for row in rows), default=0)
        shares = [_relative_errors(row, prefix, longest) for row in rows]
        return torch.tensor(shares, dtype=torch.float64).view(len(rows), longest + 1)

    @cached_property
    def types(self) -> dict[Place, str]:
        """The type of every layer; if there are many, their bits to a quarter. Empty if all layers have the same."""
        types = {self.places[row["name"]]: row["codebook"] for row in self.rows}
        if len(set(types.values())) > _TYPES:
            types = {place: f"{round(4 * CODEBOOKS[name]) / 4:g} bits" for place, name in types.items()}
        return types if len(set(types.values())) > 1 else {}

    @cached_property
    def ranks(self) -> dict[Place, int]:
        """The rank of the adapter of every layer. Empty if the rank is the same in all layers."""
        ranks = {self.places[name]: len(values) for name, values in self.spectra.items()}
        return ranks if len(set(ranks.values())) > 1 else {}

    def captured(self, kind: str | None = None) -> torch.Tensor:
        """‖i first singular values of s·B·A‖² / (‖s·B·A‖² + ‖W − Q − s·B·A‖²): (layers, rank + 1), one kind or all."""
        longest = max(len(values) for values in self.spectra.values())
        shares = []
        for row in self.rows:
            if kind not in (None, self.places[row["name"]].kind):
                continue
            squares = torch.zeros(longest + 1, dtype=torch.float64)
            values = self.spectra[row["name"]]
            squares[1 : len(values) + 1] = values.double().square()
            rest = (row["error"] * row["weight_norm"]) ** 2
            shares.append(squares.cumsum(0) / (squares.sum() + rest or 1.0))
        return torch.stack(shares)


def measure(folders: Iterable[str | Path]) -> list[Measured]:
    """Read the artifacts to compare. Raises ArtifactError for other folders, and for artifacts without errors."""
    artifacts = [open_artifact(folder) for folder in folders]
    for artifact in artifacts:
        known = artifact.manifest["kind"] in WITH_ADAPTER
        if not known or not artifact.manifest.get("layers") or "totals" not in artifact.manifest:
            kind = artifact.manifest["kind"]
            raise ArtifactError(
                f"{artifact.folder} is a {kind} folder, which has no errors of layers to report: "
                "name a folder that `loftq quantize` wrote"
            )
    labels = _labels(artifacts)
    measured = []
    for artifact, label in zip(artifacts, labels, strict=True):
        adapter, names = open_adapter(artifact.adapter), [row["name"] for row in artifact.manifest["layers"]]
        spectra = {name: _spectrum(adapter, name) for name in names}
        perplexity = _perplexity(artifact.folder)
        measured.append(Measured(label, artifact, places(names), spectra, perplexity=perplexity))
    series = list(dict.fromkeys(one.name for one in measured))
    return [replace(one, series=series.index(one.name)) for one in measured]


def _perplexity(folder: Path) -> dict[str, float]:
    """The perplexities of a cell, as the sweep in the folder above it has recorded them."""
    record = read_sweep(folder.absolute().parent)
    if record is None:
        return {}
    row = next((row for row in record["cells"] if row["cell"] == folder.name), None)
    if row is None:
        return {}
    names = {"start": "start_perplexity", "trained": "trained_perplexity"}
    found = {"full": record["full_precision"].get("perplexity"), **{name: row.get(key) for name, key in names.items()}}
    return {name: float(value) for name, value in found.items() if value is not None}


def places(names: Sequence[str]) -> dict[str, Place]:
    """The places of modules, from their names: `decoder.layers.3.mlp.up_proj` has the kind `up_proj`.

    A kind is the shortest end of a name that no other kind has.
    """
    parts = {name: re.fullmatch(r"(.*?\.\d+)\.(.*)", name) for name in names}
    blocks = {name: match[1] if match else "" for name, match in parts.items()}
    rests = {name: re.sub(r"\.\d+(?=\.|$)", "", match[2] if match else name) for name, match in parts.items()}
    order = {block: depth for depth, block in enumerate(dict.fromkeys(blocks.values()))}
    kinds = set(rests.values())
    short = {kind: visible(_shortest(kind, kinds)) for kind in kinds}
    return {name: Place(order[blocks[name]], short[rests[name]]) for name in names}


def _shortest(name: str, all_names: Iterable[str]) -> str:
    parts, others = name.split("."), [other.split(".") for other in all_names if other != name]
    lengths = range(1, len(parts) + 1)
    return next((".".join(parts[-n:]) for n in lengths if all(other[-n:] != parts[-n:] for other in others)), name)


def _together(rows: Iterable[Row], key: str) -> float | None:
    return summed_errors([row for row in rows if key in row]).get(key)


def _relative_errors(row: Row, prefix: str, length: int) -> list[float]:
    """The error after each iteration, relative to plain rounding. The last error is repeated up to the length."""
    errors = [row[f"{prefix}plain_error"], *row[f"{prefix}iterations"]]
    shares = [error / errors[0] for error in errors]
    return [*shares, *[shares[-1]] * (length + 1 - len(shares))]


def _spectrum(adapter: Adapter, module: str) -> torch.Tensor:
    """The singular values of s·B·A, computed from the small factors.

    For fused experts, the root of the sum of their squares over the experts: the norm that a rank holds.
    """
    if adapter.experts(module):
        experts = zip(*adapter.expert_factors(module), strict=True)
        values = torch.stack([_values(a, b) for a, b in experts])
        return adapter.scaling_of(module) * values.square().sum(0).sqrt()
    a, b = adapter.factors(module)
    values = adapter.scaling_of(module) * _values(a, b)
    if adapter.pool_size is None:
        return values
    values *= a.shape[1] / adapter.pool_size * adapter.pool_size**0.5  # each pool is spread over its inputs
    return values


def _values(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The singular values of B·A."""
    core = torch.linalg.qr(b).R @ torch.linalg.qr(a.t()).R.t()
    values: torch.Tensor = torch.linalg.svdvals(core)
    return values


def _labels(artifacts: Sequence[Artifact]) -> list[str]:
    """Labels that distinguish artifacts: type, rank, method, and the name of the folder if those are equal."""
    labels = [_label(artifact.manifest) for artifact in artifacts]
    counts = Counter(labels)
    return [
        label if counts[label] == 1 else f"{label} ({visible(artifact.folder.resolve().name)})"
        for label, artifact in zip(labels, artifacts, strict=True)
    ]


def _label(manifest: Mapping[str, Any]) -> str:
    recipe = manifest["recipe"]
    kinds = {row["codebook"].upper() for row in manifest["layers"]}
    kind = kinds.pop() if len(kinds) == 1 else f"{recipe['bits']} bits"
    return visible(f"{kind}, rank {recipe['rank']}, {title_of(recipe)}")
