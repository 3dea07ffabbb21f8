"""LoRA on packed experts: peft's own wrapper of a parameter, whose product is added to the tokens.

peft adds the product of the factors to the weights of all experts, in each pass. On packed experts, the wrapper hands
its factors to the module instead (`expert_pass`). peft recognizes wrappers by the name of their class.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import layer

from loftq.models.expert_pass import ActiveFactors
from loftq.models.packed_experts import Packed, PackedExperts, to_packed


class ParamWrapper(layer.ParamWrapper):  # type: ignore[misc]
    """peft's LoRA wrapper around a parameter of packed experts, or around another such wrapper."""

    _packed: Packed | None = None  # of the module, while this wrapper has made it dense

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:  # noqa: ARG002
        base: PackedExperts = self.get_base_layer()
        self.num_experts, rows, columns = base.packed_stacks[self.parameter_name].shape
        self._param_ndim = 3
        return (columns, rows) if base.is_transposed else (rows, columns)  # peft swaps those that are not transposed

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        base = self.get_base_layer()
        if not isinstance(base, PackedExperts):
            with super()._activate_lora(active_adapters):
                yield
            return
        base.active_factors[self.parameter_name] = [
            ActiveFactors(self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])
            for name in active_adapters
            if name in self.lora_A
        ]
        try:
            yield
        finally:
            del base.active_factors[self.parameter_name]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge into dense weights, in the compute dtype. The first wrapper that merges makes the module dense."""
        base = self.get_base_layer()
        if isinstance(base, PackedExperts):
            self._packed = base.to_dense()
        super().merge(safe_merge, adapter_names)
        torch.nn.Module.train(base, self.training)

    def unmerge(self) -> None:
        """Put the packed weights of the whole module back."""
        base = self.get_base_layer()
        if self._packed is not None:
            to_packed(base, self._packed)
            self._packed = None
        if isinstance(base, PackedExperts):
            self.merged_adapters.clear()
        else:
            super().unmerge()
