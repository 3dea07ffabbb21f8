"""Base class of targets that write the folder of a model, one linear at a time, with configuration and tokenizer."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from loftq.artifacts.manifest import write_merged_manifest
from loftq.artifacts.staging import Staging
from loftq.core.grid import Grid
from loftq.formats.checkpoint import INDEX, Shard, TensorSpec, index_text, lay_out, parse_size
from loftq.formats.model_config import config_text
from loftq.formats.shard_writer import ShardWriter
from loftq.merging.target import Target


class ModelFolder(Target):
    """A folder that a library loads as a model."""

    format: ClassVar[str]  # for the manifest: a name of LAYOUTS, or of a format that loftq does not read
    metadata: ClassVar[dict[str, str]] = {}  # additional metadata in the header of each shard

    @abstractmethod
    def specs(self, module: str) -> list[TensorSpec]:
        """The tensors of one linear."""

    @abstractmethod
    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """The values of these tensors."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The contents of `config.json`."""

    def grid(self, _module: str) -> Grid | None:
        """The type in which a linear is written; None if the format is not in LAYOUTS."""
        return None

    def describe_loss(self, _staging: Staging) -> dict[str, Any]:
        """What the manifest and the card say of what is lost, once the weights and `config.json` are written."""
        return {}

    def name_of(self, name: str) -> str:
        """The name under which a tensor that is not quantized is written."""
        return name

    @cached_property
    def shards(self) -> list[Shard]:
        """The files of the weights, with tensors in the order of the backbone."""
        backbone, kept = self.pair.backbone, self.kept
        groups = []
        seen: set[str] = set()
        for name in [*backbone.checkpoint.tensors, *(name for name in kept if name not in backbone.checkpoint.tensors)]:
            module = backbone.owners.get(name)
            if module is None:
                groups.append([replace(kept[name], name=self.name_of(name))])
            elif module not in seen:
                seen.add(module)
                groups.append(self.specs(module))
        return lay_out(groups, parse_size(self.run.max_shard_size), metadata=self.metadata)

    @property
    def planned_bytes(self) -> int:
        """The bytes of all shards."""
        return sum(shard.nbytes for shard in self.shards)

    def write(self, staging: Staging) -> None:
        """Write the weights, with a progress bar on stderr, then configuration, tokenizer, card and manifest."""
        self._write_weights(staging)
        pair = self.pair
        for name, path in pair.side_files.items():
            staging.copy(path, name)
        staging.write_text("config.json", config_text(self.config()))
        if len(self.shards) > 1:
            staging.write_text(INDEX, index_text(self.shards))
        grids = {module: grid for module in pair.backbone.grids if (grid := self.grid(module)) is not None}
        source = {**self.source, **self.describe_loss(staging)}
        write_merged_manifest(staging, pair.backbone, source, self.format, grids, self.shards)

    def _write_weights(self, staging: Staging) -> None:
        kept = self.kept
        names = [*self.pair.backbone.grids, *kept]
        with staging.writing(self.shards) as writer:
            left = [name for name in names if name not in staging.done]
            bar = tqdm(
                left, initial=len(names) - len(left), total=len(names), disable=self.run.quiet, dynamic_ncols=True
            )
            for name in bar:
                if name in kept:
                    place, tensor = self.name_of(name), self.pair.kept(name).to(kept[name].dtype)
                    written = {place: writer.write(place, tensor)}
                else:
                    written = self.write_module(name, writer)
                staging.note(name, {"written": written})

    def write_module(self, module: str, writer: ShardWriter) -> dict[str, str]:
        """Write the tensors of one linear. Returns the SHA-256 of each."""
        return {key: writer.write(key, tensor) for key, tensor in self.tensors(module).items()}
