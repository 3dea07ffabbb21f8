"""LoRA on a packed linear: peft's own LoRA layers with merges that work on packed codes.

peft merges by adding the product of the factors to `weight.data`, which is impossible for packed codes. Here a merge
replaces the packed linear by a dense one, and unmerging restores the packed one. peft's QA-LoRA, which peft itself
offers only on gptqmodel's layers and without merging, also works here.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer, model
from peft.tuners.lora.variants import QALoraLinearVariant

from loftq.core import pooled
from loftq.models.packed_experts import PackedExperts
from loftq.models.packed_linear import PackedLinear
from loftq.models.peft_experts import ParamWrapper


class PooledVariant(QALoraLinearVariant):  # type: ignore[misc]
    """peft's QA-LoRA with its own forward, and with merging, which it lacks."""

    @staticmethod
    def get_delta_weight(module: Any, active_adapter: str) -> torch.Tensor:
        """The matrix (out, in) that the adapter adds to the weight."""
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        pool = module.qalora_group_size[active_adapter]
        return pooled.delta(a, b, module.scaling[active_adapter], pool)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """Return the weight plus the adapter's matrix."""
        return orig_weight + PooledVariant.get_delta_weight(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Add the adapter's matrix to the weight in place."""
        orig_weight.data = PooledVariant.merge_safe(module, active_adapter, orig_weight.data)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """Return the weight minus the adapter's matrix."""
        return orig_weight - PooledVariant.get_delta_weight(module, active_adapter).to(orig_weight.dtype)


class PackedLoraLinear(layer.Linear):  # type: ignore[misc]
    """peft's LoRA layer around a `PackedLinear`."""

    base_layer: Any

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> Any:
        """Our QA-LoRA if the config selects QA-LoRA, otherwise peft's own choice."""
        return PooledVariant() if config.use_qalora else super().resolve_lora_variant(config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge into a dense copy of the base layer, in its compute dtype."""
        if isinstance(self.base_layer, PackedLinear):
            self._packed = [self.base_layer]  # in a list, so that it does not become a submodule
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
    if isinstance(base, PackedExperts) and kwargs.get("parameter_name") is not None:
        return ParamWrapper(target, adapter_name, config=config, **kwargs)
    if isinstance(base, PackedLinear):
        return PackedLoraLinear(target, adapter_name, config=config, **kwargs)
    return _dispatch_default(target, adapter_name, config=config, **kwargs)


model.dispatch_default = _dispatch
