"""The interface of a target of `loftq merge --to`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch

from loftq.artifacts.pair import BackboneAndAdapter
from loftq.artifacts.staging import Staging
from loftq.errors import ArtifactError
from loftq.formats import adapter as adapters
from loftq.formats.checkpoint import Checkpoint, TensorSpec
from loftq.hub.source import side_files
from loftq.merging.settings import MergeRun, MergeSettings
from loftq.models.tasks import TASKS, auto_class


class Target(ABC):
    """A merge of one pair."""

    name: ClassVar[str]  # the value of --to
    suffix: ClassVar[str] = ".safetensors"  # of the files with the weights
    any_backbone: ClassVar[bool] = False  # whether the adapter may have been trained on another backbone
    comparable: ClassVar[bool] = False  # whether transformers can load the result, to compare its logits
    tolerance: ClassVar[float | None] = None  # maximum error of logits relative to their norm; None: no limit
    rounds: ClassVar[bool] = False  # whether the sum of backbone and adapter is rounded, as `rounded` computes it
    uses: ClassVar[tuple[str, ...]] = ()  # the names of the settings that it uses

    def __init__(self, pair: BackboneAndAdapter, settings: MergeSettings, run: MergeRun) -> None:
        self.pair = pair
        self.settings = settings
        self.run = run
        self.difference: float | None = None  # that of the logits from those before the merge, once it is known

    @abstractmethod
    def check(self) -> float | None:
        """Return the part of the adapter that would be lost. Raises OptionError if the target cannot hold the pair."""

    @property
    @abstractmethod
    def planned_bytes(self) -> int:
        """The bytes that the weights will take on the disk while they are written, or a little less."""

    @abstractmethod
    def write(self, staging: Staging) -> None:
        """Write all files, the manifest last. Tensors that `staging` already has are not written again."""

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

    def fingerprint(self) -> dict[str, Any]:
        """Everything that the bytes of the result depend on."""
        weights = self.pair.adapter.folder / adapters.WEIGHTS
        state = weights.stat()
        backbone = self.pair.backbone
        return {
            "target": self.name,
            "backbone": backbone.artifact.backbone_hash if backbone.artifact else str(backbone.folder.resolve()),
            "adapter": [str(weights.resolve()), state.st_size, state.st_mtime_ns],
            "version": version("loftq"),
            "settings": {name: getattr(self.settings, name) for name in self.uses if name not in ("device",)},
            "read_files": self._states(),
        }

    def check_sources(self, fingerprint: Mapping[str, Any]) -> None:
        """Raise ArtifactError if a file that was read is not the one that it was when the fingerprint was made."""
        before = fingerprint["read_files"]
        try:
            now = self._states()
        except FileNotFoundError as error:
            raise ArtifactError(f"{error.filename} was removed during the run: restore it and run again") from error
        changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        if changed:
            raise ArtifactError(f"{changed[0]} was changed during the run: run again with --overwrite")

    def _states(self) -> dict[str, list[int]]:
        """Size and modification time (ns) of each file that is read, by its path."""
        backbone, adapter = self.pair.backbone, self.pair.adapter.folder
        names = sorted({"config.json", *backbone.checkpoint.files.values()})
        paths = [*(backbone.folder / name for name in names), *side_files(backbone.folder)]
        paths += [adapter / adapters.WEIGHTS, adapter / adapters.CONFIG]
        states = {str(path): path.stat() for path in paths}
        return {path: [state.st_size, state.st_mtime_ns] for path, state in states.items()}
