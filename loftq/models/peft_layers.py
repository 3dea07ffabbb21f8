"""LoRA on a packed linear, as peft's own LoRA layers with merges that are right.

peft adds the product of the factors to `weight.data`, and packed codes have none to add to. Here a merge puts a
dense linear in the packed one's place, and unmerging puts the packed one back. peft's QA-LoRA, which it offers on
gptqmodel's layers alone and without any merge, runs here too.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer, model
from peft.tuners.lora.variants import QALoraLinearVariant

from loftq.core import pooled
from loftq.models.packed_linear import PackedLinear


class PooledVariant(QALoraLinearVariant):  # type: ignore[misc]
    """peft's QA-LoRA: its forward, and the merges that it lacks."""

    @staticmethod
    def get_delta_weight(module: Any, active_adapter: str) -> torch.Tensor:
        """What the adapter adds to the weight: (out, in)."""
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        pool = module.qalora_group_size[active_adapter]
        return pooled.delta(a, b, module.scaling[active_adapter], pool)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The weight with the adapter in it."""
        return orig_weight + PooledVariant.get_delta_weight(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Put the adapter into the weight."""
        orig_weight.data = PooledVariant.merge_safe(module, active_adapter, orig_weight.data)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The weight without the adapter."""
        return orig_weight - PooledVariant.get_delta_weight(module, active_adapter).to(orig_weight.dtype)


class PackedLoraLinear(layer.Linear):  # type: ignore[misc]
    """peft's LoRA layer around a `PackedLinear`."""

    base_layer: Any

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> Any:
        """QA-LoRA where the config says so, or what peft has for it."""
        return PooledVariant() if config.use_qalora else super().resolve_lora_variant(config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge into a dense copy of the base layer, in its compute dtype."""
        if isinstance(self.base_layer, PackedLinear):
            self._packed = [self.base_layer]  # in a list: not a submodule
            self.base_layer = self.base_layer.to_dense()
        super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Put the packed base layer back."""
        self.merged_adapters.clear()
        if not isinstance(self.base_layer, PackedLinear):
            self.base_layer = self._packed[0]


_dispatch_default = model.dispatch_default


def _dispatch(target: Any, adapter_name: str, config: Any, **kwargs: Any) -> Any:
    base = target.get_base_layer() if isinstance(target, layer.BaseTunerLayer) else target
    if isinstance(base, PackedLinear):
        return PackedLoraLinear(target, adapter_name, config=config, **kwargs)
    return _dispatch_default(target, adapter_name, config=config, **kwargs)


model.dispatch_default = _dispatch
