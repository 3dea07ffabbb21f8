"""`loftq merge --to lora`: the adapter alone, as a plain LoRA that any server can load.

A QA-LoRA stays an adapter of its backbone: each column of A is repeated for every input of its pool. A plain LoRA that
began by LoftQ becomes an adapter of the full-precision model: what training changed of it (`core.adapter_change`).
"""

from __future__ import annotations

import math
import re
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from loftq.artifacts.serving import VLLM_RANKS
from loftq.artifacts.staging import Staging
from loftq.core import pooled
from loftq.core.adapter_change import Factors, change, truncated
from loftq.errors import OptionError
from loftq.formats import adapter as adapters
from loftq.formats import expert_factors
from loftq.formats.adapter import Adapter, open_adapter
from loftq.formats.checkpoint import TensorSpec, lay_out
from loftq.formats.schema import json_text
from loftq.merging.target import Target


class PlainLora(Target):
    """Only the adapter, in peft's format."""

    name = "lora"
    uses: ClassVar[tuple[str, ...]] = ("rank", "source")
    file: ClassVar[str] = adapters.WEIGHTS
    metadata: ClassVar[dict[str, str]] = {}
    holds_experts: ClassVar[bool] = True  # whether the form has a place for factors of fused experts

    def check(self) -> None:
        """Return None. Raises OptionError if it is not known how the adapter began, and for a rank that it lacks."""
        adapter, rank = self.pair.adapter, self.settings.rank
        experts = [module for module in adapter.modules if adapter.experts(module)]
        if experts and not self.holds_experts:
            raise OptionError(
                f"--to {self.name} has no place for the factors of fused experts ({experts[0]}): use --to lora"
            )
        if adapter.pool_size is None and self._initial is None:
            raise OptionError(
                f"{adapter.folder} is a plain LoRA of {self.pair.backbone.folder}, which has no initial adapter that "
                "could be taken off: any LoRA server can load it as it is, on this backbone"
            )
        if rank is not None and (adapter.pool_size is not None or rank > self._full_rank):
            most = adapter.config["r"] if adapter.pool_size is not None else self._full_rank
            raise OptionError(f"--rank {rank}: {adapter.folder} gives a plain LoRA of rank {most}: leave it out")

    def notes(self) -> tuple[str, ...]:
        """Notes for the user: the model that the adapter belongs to, and what a lower rank leaves of it."""
        notes = [*super().notes(), f"load it on {self.base_model}"]
        if self.rank > VLLM_RANKS[-1]:
            notes.append(
                f"its rank is {self.rank}, and vLLM takes up to {VLLM_RANKS[-1]}: give a lower one with --rank"
            )
        if self.settings.rank is not None and self.settings.rank < self._full_rank:
            left, whole = (sum(part) for part in zip(*self._norms(), strict=True))
            part = math.sqrt(left / whole) if whole else 0.0
            full = f"nothing is left out with --rank {self._full_rank}"
            notes.append(f"rank {self.settings.rank} leaves out {part:.1%} of what training changed: {full}")
        return tuple(notes)

    @property
    def base_model(self) -> str:
        """The model that the result belongs to."""
        artifact, config = self.pair.backbone.artifact, self.pair.adapter.config
        if self.pair.adapter.pool_size is not None or artifact is None:
            return str(self.settings.source or config.get("base_model_name_or_path") or self.pair.backbone.folder)
        return str(self.settings.source or artifact.manifest["source"]["model"])

    @property
    def source(self) -> dict[str, Any]:
        """What the adapter was made from, and its rank."""
        base = self.settings.source
        named = {"base": base} if base is not None and base.count("/") == 1 and not Path(base).exists() else {}
        return {**super().source, **named, "rank": self.rank}

    @property
    def rank(self) -> int:
        """The rank of the result."""
        return self.settings.rank or self._full_rank

    def rank_of(self, module: str) -> int:
        """The rank of a module in the result, or of each expert of a parameter."""
        return min(self.rank, self._full_rank_of(module))

    def factors(self, module: str) -> list[Factors]:
        """A (rank, in) and B (out, rank) of a module, float32, or those of each expert of a parameter."""
        adapter, rank = self.pair.adapter, self.rank_of(module)
        if adapter.pool_size is not None:
            a, b = adapter.factors(module)
            return [(pooled.plain_lora(a, adapter.pool_size), b)]
        changes = self._changes(module)
        return [truncated(whole, rank)[0] for whole in changes] if rank < self._full_rank_of(module) else changes

    @property
    def planned_bytes(self) -> int:
        """The bytes of all factors."""
        return sum(spec.nbytes for group in self._groups for spec in group)

    @property
    def _groups(self) -> list[list[TensorSpec]]:
        """The tensors of each module, then those that the adapter holds as a whole."""
        adapter = self.pair.adapter
        groups = [self.specs(module) for module in adapter.modules]
        return groups + [[TensorSpec(key, torch.float32, adapter.shapes[key])] for key in adapter.saved.values()]

    def write(self, staging: Staging) -> None:
        """Write the weights and the configuration of the adapter."""
        adapter = self.pair.adapter
        with staging.writing(lay_out(self._groups, self.planned_bytes + 1, self.file, self.metadata)) as writer:
            for name in [*adapter.modules, *adapter.saved.values()]:
                if name in staging.done:
                    continue
                whole = name in adapter.shapes
                tensors = {name: adapter.read(name).float()} if whole else self.tensors(name)
                staging.note(name, {"written": {key: writer.write(key, tensor) for key, tensor in tensors.items()}})
        staging.write_text(adapters.CONFIG, json_text(self.config(), indent=2, sort_keys=True) + "\n")
        self.write_manifest(staging, "adapter")

    def specs(self, module: str) -> list[TensorSpec]:
        """The tensors of one module."""
        return adapters.specs(module, self.pair.backbone.shapes[module], self.rank_of(module))

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """Their values."""
        shape, factors = self.pair.backbone.shapes[module], self.factors(module)
        values = expert_factors.joined(factors) if len(shape) == 3 else factors[0]
        return dict(zip(adapters.factor_keys(module, shape), values, strict=True))

    def config(self) -> dict[str, Any]:
        """The contents of `adapter_config.json`."""
        adapter = self.pair.adapter
        left_out = ("use_qalora", "qalora_group_size")
        config = {key: value for key, value in adapter.config.items() if key not in left_out}
        if adapter.pool_size is not None:
            return config
        ranks = self._rank_pattern()
        own = {"r": self.rank, "lora_alpha": self.rank, "use_rslora": False, "init_lora_weights": True}
        patterns = {"rank_pattern": ranks, "alpha_pattern": ranks}  # the scaling is 1 everywhere
        return config | own | patterns | {"base_model_name_or_path": self.base_model}

    def _rank_pattern(self) -> dict[str, int]:
        """The ranks that differ from the rank of the whole adapter, by patterns of names as peft reads them."""
        adapter = self.pair.adapter
        others = {module: rank for module in adapter.modules if (rank := self.rank_of(module)) != self.rank}
        of_experts = [rank for module, rank in others.items() if adapter.experts(module)]
        parameters = adapter.config.get("target_parameters") or () if of_experts else ()
        linears = {re.escape(module): rank for module, rank in others.items() if not adapter.experts(module)}
        return linears | dict.fromkeys(parameters, *of_experts[:1])

    @cached_property
    def _initial(self) -> Adapter | None:
        """The adapter with which training began."""
        artifact = self.pair.backbone.artifact
        return open_adapter(artifact.adapter) if artifact is not None and artifact.adapter.is_dir() else None

    @cached_property
    def _full_rank(self) -> int:
        """The rank of all that training changed: that of the adapter alone, if it began with B = 0."""
        return max(map(self._full_rank_of, self.pair.adapter.modules))

    def _full_rank_of(self, module: str) -> int:
        adapter, initial = self.pair.adapter, self._initial
        rank = adapter.rank_of(module)
        if adapter.pool_size is not None or initial is None or self._began_at_zero:
            return rank
        return rank + initial.rank_of(module)

    @cached_property
    def _began_at_zero(self) -> bool:
        initial = self._initial
        return initial is None or not any(bool(initial.factors(module)[1].any()) for module in initial.modules)

    def _changes(self, module: str) -> list[Factors]:
        """All that training changed of a module, or of each expert of a parameter."""
        adapter, initial = self.pair.adapter, self._initial
        scaling, trained = adapter.scaling_of(module), _each(adapter, module)
        if initial is None or self._began_at_zero:
            return [(a, scaling * b) for a, b in trained]
        pairs = zip(trained, _each(initial, module), strict=True)
        return [change(after, scaling, before, initial.scaling_of(module)) for after, before in pairs]

    def _norms(self) -> list[tuple[float, float]]:
        """The squared norms of what a lower rank leaves out of each matrix, and of the whole."""
        modules = self.pair.adapter.modules
        return [truncated(whole, self.rank)[1:] for module in modules for whole in self._changes(module)]


def _each(adapter: Adapter, module: str) -> list[Factors]:
    """The factors of a module, or those of each expert of a parameter."""
    if not adapter.experts(module):
        return [adapter.factors(module)]
    return list(zip(*adapter.expert_factors(module), strict=True))
