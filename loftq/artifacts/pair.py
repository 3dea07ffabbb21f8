"""A backbone together with the adapter that is merged into it, and how both are opened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from loftq.artifacts.backbone import Backbone, open_backbone
from loftq.artifacts.checks import backbone_problems, collected
from loftq.artifacts.embeddings import Embeddings, embeddings_of
from loftq.artifacts.pair_checks import check_tensors
from loftq.core import pooled
from loftq.core.affine import AffineWeight
from loftq.core.scales import Scales
from loftq.errors import ArtifactError, OptionError
from loftq.formats.adapter import Adapter, open_adapter
from loftq.formats.artifact import MANIFEST
from loftq.formats.model_files import TOKENIZER, is_tokenizer_file
from loftq.hub.source import side_files
from loftq.models.adapter_settings import check_mergeable
from loftq.models.adapters import fitting_adapter, other_backbone, trained_on_original
from loftq.models.tasks import build_meta


@dataclass(frozen=True)
class BackboneAndAdapter:
    """A backbone and the adapter that is merged into it.

    `other_backbone` names the model on which the adapter was trained, if it differs from this one. `embeddings` says
    what the adapter changes about the vocabulary.
    """

    backbone: Backbone
    adapter: Adapter
    other_backbone: str | None = None
    embeddings: Embeddings = field(default_factory=Embeddings)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The `config.json` of the backbone, with the vocabulary of the adapter."""
        return self.embeddings.config(self.backbone.config)

    def kept(self, name: str) -> torch.Tensor:
        """A tensor outside the quantized weights. If the adapter has it too (a head), the adapter's is read."""
        saved = self.adapter.saved.get(name)
        if saved is not None:
            return self.adapter.read(saved)
        tensor = self.backbone.checkpoint.read((self.embeddings.untied or {}).get(name, name))
        if not self.embeddings.resizes(name, tuple(tensor.shape)):
            return tensor
        return nn.functional.pad(tensor, (0, cast(int, self.embeddings.vocabulary) - tensor.shape[-1]))

    @cached_property
    def side_files(self) -> dict[str, Path]:
        """The files to copy beside the weights, by name. The tokenizer is that of the adapter if it has one of its own.

        If the adapter changes the number of tokens, nothing is left of the tokenizer of the backbone.
        """
        files, own = ({path.relative_to(at).as_posix(): path for path in side_files(at)} for at in self._folders)
        own = {name: path for name, path in own.items() if is_tokenizer_file(name)}
        if TOKENIZER not in own:
            return files
        resized = self.embeddings.vocabulary is not None
        return {name: path for name, path in files.items() if not (resized and is_tokenizer_file(name))} | own

    @property
    def _folders(self) -> tuple[Path, Path]:
        return self.backbone.folder, self.adapter.folder

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The factors A and B of a module; None if the adapter has none for it."""
        return self.adapter.factors(module) if self.adapter.adapts(module) else None

    def expert_factors(self, module: str) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """The factors A and B of each expert of a parameter; None if the adapter has none for it."""
        if not self.adapter.adapts(module):
            return None
        return list(zip(*self.adapter.expert_factors(module), strict=True))

    def delta(self, module: str) -> torch.Tensor | None:
        """The matrix that the adapter adds to the weight of a module: (out, in). None if it adds nothing."""
        factors = self.factors(module)
        scaling = self.adapter.scaling_of(module)
        return None if factors is None else pooled.delta(*factors, scaling, self.adapter.pool_size)

    def merged_experts(self, module: str) -> Iterator[torch.Tensor]:
        """The dense weight of each expert of a parameter, with the adapter merged into it: float32 (out, in)."""
        factors, scaling = self.expert_factors(module), self.adapter.scaling_of(module)
        for expert in range(self.backbone.stacks[module]):
            weight = self.backbone.dense(module, expert)
            if factors is not None:
                a, b = factors[expert]
                weight += pooled.delta(a.contiguous(), b.contiguous(), scaling, None)
            yield weight

    def merged(self, module: str) -> torch.Tensor:
        """The weight of a module with its adapter: float32 (out, in)."""
        weight, added = self.backbone.dense(module), self.delta(module)
        if added is not None:
            weight += added
        return weight

    def correction(self, module: str) -> torch.Tensor | None:
        """The matrix that a QA-LoRA adapter adds to the pools of a module: (out, pools). None if it adds nothing."""
        factors = self.factors(module)
        if factors is None:
            return None
        return pooled.correction(*factors, self.adapter.scaling_of(module), cast(int, self.adapter.pool_size))

    def shifts(self, module: str, scales: Scales) -> torch.Tensor:
        """The shifts of the groups of a module, with the adapter merged into them: float32 (groups,)."""
        added = self.correction(module)
        if added is None:
            return scales.offsets
        return pooled.merge_shifts(scales.offsets.view(len(added), -1), added).view(-1)

    def affine(self, module: str) -> AffineWeight:
        """The integers of a module, with the adapter merged into their shifts."""
        weight, added = self.backbone.affine(module), self.correction(module)
        return weight if added is None else pooled.merge_correction(weight, added)

    def require_pools(self) -> None:
        """Raise OptionError unless the adapter can be merged into the zero-points of the backbone."""
        pool = self.adapter.pool_size
        if pool is None:
            raise OptionError(
                f"{self.adapter.folder} is a plain LoRA: it adds different values within a group, which a zero-point "
                "cannot represent: merge with --to bf16, or train a QA-LoRA (`loftq quantize --adapter qalora`)"
            )
        self.backbone.require_zero_points()
        for module in self.adapter.modules:
            block = self.backbone.grids[module].block(self.backbone.shapes[module][-1])
            if pool % block:
                raise OptionError(
                    f"{self.adapter.folder} pools {pool} inputs, which is not a multiple of the group size {block} of "
                    f"{module}: merge with --to bf16"
                )


def open_pair(folder: Path, adapter: str | Path | None) -> BackboneAndAdapter:
    """A folder of ours, or a GPTQ checkpoint, with an adapter: by default the initial one of the folder.

    Raises ArtifactError for an adapter of other linears, and OptionError for one that cannot be merged here.
    """
    backbone = open_backbone(folder)
    ours = backbone.artifact
    if ours is not None:
        for problem in collected(backbone_problems(backbone, ours.manifest), MANIFEST):
            raise ArtifactError(
                f"{folder} does not match its {MANIFEST}: {problem.where}: {problem.what} "
                f"(`loftq verify {folder}` lists all problems): copy or download the folder again"
            )
    if adapter is None:
        if ours is None or not ours.adapter.is_dir():
            raise OptionError(f"{folder} has no adapter of its own: name a trained one with --adapter")
        adapter = ours.adapter
    chosen, other = Path(adapter), None
    if ours is None:
        opened = open_adapter(chosen)
        check_mergeable(opened)
        other = trained_on_original(opened, None)
        unknown = sorted(set(opened.modules) - set(backbone.grids))
        if unknown:
            raise ArtifactError(
                f"the adapter {chosen} adapts {unknown[0]!r}, which is not a quantized linear of {folder}"
            )
    else:
        check_mergeable(open_adapter(chosen))
        opened = fitting_adapter(ours, chosen)
        other = other_backbone(ours, opened)
    model, _ = build_meta(backbone.folder, task=backbone.task)
    embeddings = embeddings_of(model, backbone, opened)
    check_tensors(model, backbone, opened, embeddings)
    return BackboneAndAdapter(backbone, opened, other, embeddings)
