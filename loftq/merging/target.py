"""The interface of a target of `loftq merge --to`: what becomes of a backbone and its adapter."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from loftq.artifacts.manifest import origin_of, write_export_manifest
from loftq.artifacts.pair import BackboneAndAdapter
from loftq.artifacts.staging import Staging
from loftq.errors import ArtifactError
from loftq.formats import adapter as adapters
from loftq.formats.checkpoint import Checkpoint, TensorSpec
from loftq.merging.export import Export
from loftq.merging.settings import MergeRun, MergeSettings
from loftq.models.tasks import TASKS, auto_class


class Target(Export):
    """A merge of one pair."""

    any_backbone: ClassVar[bool] = False  # whether the adapter may have been trained on another backbone
    comparable: ClassVar[bool] = False  # whether transformers can load the result, to compare its logits
    tolerance: ClassVar[float | None] = None  # maximum error of logits relative to their norm; None: no limit
    rounds: ClassVar[bool] = False  # whether the sum of backbone and adapter is rounded, as `rounded` computes it

    def __init__(self, pair: BackboneAndAdapter, settings: MergeSettings, run: MergeRun) -> None:
        super().__init__(settings, run)
        self.pair = pair

    @classmethod
    def of(cls, pair: BackboneAndAdapter) -> type[Target]:  # noqa: ARG003
        """The class that merges a pair, if there are several of one name."""
        return cls

    def rounded(self, _module: str, _written: Checkpoint, weight: torch.Tensor) -> torch.Tensor:
        """The sum of backbone and adapter of a module as the target rounds it: float32, like `weight`.

        `weight` is that sum as other code computed it; `_written` has the tensors that were written.
        """
        return weight

    def load(self, folder: Path) -> Any:
        """The result as transformers loads it, in float32, to compare its logits."""
        return auto_class(TASKS[self.pair.backbone.task]).from_pretrained(folder, dtype=torch.float32)

    @cached_property
    def kept(self) -> dict[str, TensorSpec]:
        """The tensors that are not quantized, by name. A trained head of the adapter replaces that of the backbone."""
        backbone = self.pair.backbone
        specs = {name: spec for name, spec in backbone.checkpoint.tensors.items() if name not in backbone.owners}
        for name, source in (self.pair.embeddings.untied or {}).items():
            specs[name] = replace(specs[source], name=name)
        for name, key in self.pair.adapter.saved.items():
            specs[name] = TensorSpec(name, backbone.dtype, self.pair.adapter.shapes[key])
        embeddings = self.pair.embeddings
        for name, spec in specs.items():
            if embeddings.resizes(name, spec.shape) and embeddings.vocabulary is not None:
                specs[name] = replace(spec, shape=(*spec.shape[:-1], embeddings.vocabulary))
        return specs

    def notes(self) -> tuple[str, ...]:
        """Notes on the pair for the user. Raises ArtifactError for an adapter of another backbone."""
        other = self.pair.other_backbone
        if other is None:
            return ()
        text = (
            f"{self.pair.adapter.folder} was trained on {other}, another backbone than {self.pair.backbone.folder}: it "
            "does not fit the rounding errors of these weights"
        )
        if not self.any_backbone:
            raise ArtifactError(f"{text}; merge it with --to {self.name} into its own")
        return (text,)

    def made_from(self) -> dict[str, Any]:
        """The backbone, and the weights of the adapter."""
        weights = self.pair.adapter.folder / adapters.WEIGHTS
        state, backbone = weights.stat(), self.pair.backbone
        return {
            "backbone": backbone.artifact.backbone_hash if backbone.artifact else str(backbone.folder.resolve()),
            "adapter": [str(weights.resolve()), state.st_size, state.st_mtime_ns],
        }

    def read_files(self) -> list[Path]:
        """The files of the backbone, of the adapter, and those beside the weights."""
        backbone, adapter = self.pair.backbone, self.pair.adapter.folder
        names = sorted({"config.json", *backbone.checkpoint.files.values()})
        paths = [*(backbone.folder / name for name in names), *self.pair.side_files.values()]
        return [*paths, adapter / adapters.WEIGHTS, adapter / adapters.CONFIG]

    @property
    def layers(self) -> int:
        """The number of linears that have factors."""
        return len(self.pair.adapter.modules)

    @property
    def source(self) -> dict[str, Any]:
        """What the result is made from, for its manifest and its card."""
        backbone = self.pair.backbone
        return {
            "model": backbone.folder.name,
            "task": backbone.task,
            "target": self.name,
            "adapter": self.pair.adapter.kind,
            **origin_of(backbone.folder, backbone.artifact.manifest if backbone.artifact else None),
        }

    def write_manifest(self, staging: Staging, kind: str) -> None:
        """Write the card and the manifest of a result that is no folder of a model."""
        backbone = self.pair.backbone
        known = backbone.artifact.backbone_hash if backbone.artifact else ""
        write_export_manifest(staging, backbone.folder, self.source, kind, known)
