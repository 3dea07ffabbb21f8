"""Computes the factors of an adapter for a given backbone, one linear after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loftq.artifacts.rows import error_entries
from loftq.calibration.statistics import Statistics
from loftq.core.solvers.given import fit_factors
from loftq.core.solvers.solution import unsolvable
from loftq.display import key_values, one_line, size
from loftq.errors import SourceError
from loftq.formats import adapter
from loftq.formats.shard_writer import ShardWriter
from loftq.planning.given_backbone import GivenBackbone
from loftq.planning.plan import Layer, Plan
from loftq.planning.recipe import layer_seed
from loftq.planning.weights import is_finite, read_source_weight
from loftq.solving.report import Report, statistics_row


class AdapterSolver:
    """Writes the factors of one layer after the other."""

    def __init__(
        self, plan: Plan, backbone: GivenBackbone, statistics: Statistics | None, device: torch.device
    ) -> None:
        self._plan, self._backbone, self._statistics, self._device = plan, backbone, statistics, device

    def __call__(self, layer: Layer, writer: ShardWriter) -> dict[str, Any]:
        """Solve a layer, and return its record. Raises SourceError if the backbone is not made from this weight."""
        plan, recipe, statistics = self._plan, self._plan.recipe, self._statistics
        weight, digest = read_source_weight(plan, layer, self._device)
        moment = None
        if statistics is not None:
            statistics.check_weights(layer.module, {layer.tensor: digest})
            moment = statistics.moment(layer.module)
        given = self._backbone.read(layer).to(self._device)
        if not is_finite(given):
            raise SourceError(
                f"--backbone {self._backbone.source.name}: {layer.module} holds NaN or Inf: download it again"
            )
        check_related(weight, given, layer, self._backbone.source.name, plan.source.name)
        metric = recipe.solving.metric if moment is not None else "identity"
        seed = layer_seed(recipe.seed, layer.module)
        try:
            a, b, trace = fit_factors(
                weight, given, metric, moment, layer.rank, recipe.scaling, svd=recipe.svd, seed=seed
            )
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise unsolvable(layer.module, one_line(error)) from error
        factors = dict(zip(adapter.keys(layer.module), (a.cpu(), b.cpu()), strict=True))
        if not all(map(is_finite, factors.values())):
            raise unsolvable(layer.module, "a factor is NaN or Inf")
        written = {name: writer.write(name, tensor) for name, tensor in factors.items()}
        row = {"name": layer.module, "shape": list(layer.shape), **error_entries(trace)}
        return {"sha256": digest, "row": row, "written": written}

    def check_first(self) -> None:
        """Raise the errors of the first layer before anything is written."""
        layer = self._plan.layers[0]
        weight, _ = read_source_weight(self._plan, layer, torch.device("cpu"))
        given = self._backbone.read(layer)
        check_related(weight, given, layer, self._backbone.source.name, self._plan.source.name)


def check_related(weight: torch.Tensor, given: torch.Tensor, layer: Layer, backbone: str, source: str) -> None:
    """Raise SourceError if a weight is as far from its quantized form as an unrelated one would be."""
    if float((weight - given).norm()) > float(weight.norm()):
        raise SourceError(
            f"--backbone {backbone} is not a quantization of {source}: {layer.module} is farther from the weight there "
            "than zeros would be"
        )


@dataclass(frozen=True)
class AdapterReport(Report):
    """The result of `loftq.quantize` with a `backbone`: the folder of an adapter."""

    backbone: str = ""

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {**super().to_dict(), "backbone": self.backbone}

    def table(self) -> str:
        """The totals, for a person."""
        sums = self.totals
        rows = [
            ("model", f"{self.model}, {self.task}"),
            ("backbone", self.backbone),
            ("folder", str(self.folder)),
            ("layers", f"{sums['layers']}, {sums['weights'] / 1e6:,.1f} M weights"),
            ("adapter", f"{size(sums['adapter_bytes'])}, rank {self.recipe['rank']}"),
        ]
        if self.parts is not None:
            parts = ", ".join(f"{size(nbytes)} while {part}" for part, nbytes in self.parts.items())
            rows.append(("memory", f"about {parts} (planned, nothing was written)"))
            rows += statistics_row(self.statistics)
        else:
            rows += _errors(sums, "", "‖W‖")
            rows += _errors(sums, "output_", "the outputs")
            rows.append(("memory", f"{size(self.memory)} at the peak"))
            rows.append(("time", f"{self.seconds or 0:.1f} s"))
        return key_values(rows + [("note", note) for note in self.notes])

    @property
    def loading_line(self) -> str:
        """The line of Python that puts the adapter on its backbone."""
        return f'model = peft.PeftModel.from_pretrained(base, {str(self.folder)!r}, subfolder="{adapter.FOLDER}")'


def _errors(sums: Mapping[str, Any], prefix: str, unit: str) -> list[tuple[str, str]]:
    if f"{prefix}error" not in sums:
        return []
    before, after = sums[f"{prefix}plain_error"], sums[f"{prefix}error"]
    gain = f" ({1 - after / before:.1%} less)" if before > after else ""
    kind = "error of outputs" if prefix else "error"
    return [(f"{kind}, backbone", f"{before:.5f} of {unit}"), (f"{kind}, with adapter", f"{after:.5f} of {unit}{gain}")]
