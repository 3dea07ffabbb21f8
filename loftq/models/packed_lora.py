"""LoRA on a packed linear, as peft's own LoRA layer with a merge that is right.

peft adds the product of the factors to `weight.data`, and packed codes have none to add to. Here a merge puts a
dense linear in the packed one's place, and unmerging puts the packed one back.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import layer, model

from loftq.models.packed_linear import PackedLinear


class PackedLoraLinear(layer.Linear):  # type: ignore[misc]
    """peft's LoRA layer around a `PackedLinear`."""

    base_layer: Any

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
