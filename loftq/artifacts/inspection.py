"""The contents of an artifact or adapter, which `inspect` returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loftq.display import key_values, size

_ERRORS = {
    "error": ("error of weights", "plain_error", "rounded"),
    "output_error": ("error of outputs", "output_plain_error", "rounded"),
    "divergence": ("divergence", "divergence_before", "before distillation"),
}
TRAINED = "trained adapter"  # the kind of an adapter that training wrote
_SHOWN = ("method", "iters", "scales", "rounding", "refine", "allocation", "compute_dtype", "seed")


@dataclass(frozen=True)
class Inspection:
    """The contents of a folder or a repository. Sizes are in bytes; a field is empty if the folder lacks that part.

    `types` lists the types of the quantized weights, each with its bits and the number of layers and weights.
    `training` holds the data, the settings and the results of the training that wrote an adapter.
    """

    name: str
    kind: str
    commit: str | None
    source: Mapping[str, Any]
    sizes: Mapping[str, int]
    format: str | None = None
    types: Sequence[Mapping[str, Any]] = ()
    adapter: Mapping[str, Any] | None = None
    totals: Mapping[str, Any] = field(default_factory=dict)
    worst: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Number of weights in quantized linears."""
        return sum(kind["weights"] for kind in self.types)

    @property
    def bits_per_weight(self) -> float | None:
        """Average bits of a weight in quantized linears, including scales, computed from the sizes of the tensors."""
        return 8 * self.sizes["linears"] / self.weights if self.weights else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {**asdict(self), "weights": self.weights, "bits_per_weight": self.bits_per_weight}

    def table(self) -> str:
        """The contents as a table for a person."""
        return key_values(self._rows())

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "name", self.name + (f" at {self.commit[:12]}" if self.commit else "")
        yield "kind", self.kind + (f", in the format of {self.format}" if self.format else "")
        if self.source.get("model"):
            at = f" at {self.source['revision'][:12]}" if self.source.get("revision") else ""
            task = f", {self.source['task']}" if self.source.get("task") else ""
            yield "made for" if self.kind == TRAINED else "source", f"{self.source['model']}{at}{task}"
        for kind in self.types:
            yield "type", f"{kind['layers']} x {kind['type']}, {kind['weights'] / 1e6:,.1f} M weights"
        if self.bits_per_weight is not None:
            yield "bits per weight", f"{self.bits_per_weight:.3f}"
        yield "size", ", ".join(f"{name} {size(nbytes)}" for name, nbytes in self.sizes.items() if nbytes)
        yield from self._adapter_rows()
        yield from self._training_rows()
        for key, (name, before, label) in _ERRORS.items():
            if key in self.totals and before in self.totals:
                yield name, f"{self.totals[key]:.5f} ({self.totals[before]:.5f} {label})"
        for row in self.worst:
            outputs = f", outputs {row['output_error']:.5f}" if "output_error" in row else ""
            yield "worst layer", f"{row['name']}: {row['error']:.5f} ({row['plain_error']:.5f} rounded){outputs}"
        shown = [f"{name.replace('_', ' ')} {self.settings[name]}" for name in _SHOWN if self.settings.get(name)]
        if self.settings.get("calibration"):
            shown.append(f"calibrated on {Path(self.settings['calibration']).name}")
        if shown:
            yield "settings", ", ".join(shown)
        if self.versions:
            yield "made with", ", ".join(f"{name} {number}" for name, number in self.versions.items())
        yield from (("note", note) for note in self.notes)

    def _training_rows(self) -> Iterator[tuple[str, str]]:
        settings, result = self.training.get("settings", {}), self.training.get("result", {})
        for name in ("data", "eval_data"):
            if settings.get(name):
                names = settings[name] if isinstance(settings[name], list) else [settings[name]]
                digest = self.training.get("rows", {}).get(name)
                hashed = f" (rows {str(digest)[:12]})" if digest else ""
                yield name.replace("_", " "), ", ".join(map(str, names)) + hashed
        if result:
            yield "trained", f"{result['steps']:,} steps on {result['examples']:,} examples"
            if result["train_loss"] is not None:
                yield "train loss", f"{result['train_loss']:.4f}"
            for name, value in result["evaluation"].items():
                yield f"held-out {name}", f"{value:.4f}" if isinstance(value, float) else str(value)
        shown = [
            f"{name.replace('_', ' ')} {value}"
            for name, value in settings.items()
            if name not in ("model", "data", "eval_data", "output", "push_to_hub", "calibration")
        ]
        if shown:
            yield "settings", ", ".join(shown)

    def _adapter_rows(self) -> Iterator[tuple[str, str]]:
        if self.adapter is None:
            return
        kind, rank, alpha, targets, saved = (
            self.adapter[name] for name in ("kind", "rank", "alpha", "target_modules", "modules_to_save")
        )
        stabilized = ", rank-stabilized" if self.adapter["rslora"] else ""
        yield "adapter", f"{kind}, rank {rank}, alpha {alpha:g}{stabilized}, of {self.adapter['layers']} layers"
        parameters = self.adapter.get("target_parameters") or ()
        yield "targets", ", ".join([targets] if isinstance(targets, str) else [*(targets or ()), *parameters])
        if saved:
            yield "trained in full", ", ".join(saved)
