"""`loftq merge --to mlx-lora`: the adapter alone, as mlx-lm reads it.

`adapters.safetensors` has A transposed (in, r) as `lora_a` and B transposed (r, out) as `lora_b`, under the names of
the model's modules. `adapter_config.json` names the adapted modules relative to their block.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch

from loftq.errors import OptionError
from loftq.formats.checkpoint import TensorSpec
from loftq.formats.model_config import with_old_names
from loftq.merging.targets.to_lora import PlainLora

_IN_BLOCK = re.compile(r"(.*?layers\.)(\d+)\.(.+)")


class MlxLora(PlainLora):
    """The adapter of `--to lora` for mlx-lm's `adapter_path`."""

    name = "mlx-lora"
    file = "adapters.safetensors"
    metadata: ClassVar[dict[str, str]] = {"format": "mlx"}
    holds_experts = False

    def check(self) -> None:
        """Return None. Raises OptionError also for modules that mlx-lm cannot adapt."""
        super().check()
        saved = sorted(self.pair.adapter.saved)
        if saved:
            raise OptionError(
                f"--to {self.name} holds only factors, and this adapter also has {saved[0]}: use --to lora"
            )
        for module in self.pair.adapter.modules:
            if not _IN_BLOCK.fullmatch(module):
                raise OptionError(f"--to {self.name}: {module} lies in no numbered block: use --to lora")

    def notes(self) -> tuple[str, ...]:
        """Notes for the user, also on a setting that models of mlx-lm look for in one place."""
        read_at_the_top = with_old_names(self.pair.config)
        missing = {name: value for name, value in read_at_the_top.items() if name not in self.pair.config}
        if not missing:
            return super().notes()
        values = ", ".join(f"{name} ({value})" for name, value in missing.items())
        note = f"most models of mlx-lm read {values} only at the top of config.json: if your base has it in "
        return (*super().notes(), f"{note}rope_parameters alone, add it there too")

    def specs(self, module: str) -> list[TensorSpec]:
        """The tensors of one module."""
        rows, columns = self.pair.backbone.shapes[module]
        shapes = {"lora_a": (columns, self.rank), "lora_b": (self.rank, rows)}
        return [TensorSpec(f"{module}.{name}", torch.float32, shape) for name, shape in shapes.items()]

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """Their values."""
        ((a, b),) = self.factors(module)
        return {f"{module}.lora_a": a.t().contiguous(), f"{module}.lora_b": b.t().contiguous()}

    def config(self) -> dict[str, Any]:
        """The contents of `adapter_config.json`."""
        parts = [match.groups() for module in self.pair.adapter.modules if (match := _IN_BLOCK.fullmatch(module))]
        scale = self.pair.adapter.scaling if self.pair.adapter.pool_size is not None else 1.0
        parameters = {"rank": self.rank, "scale": scale, "dropout": 0.0, "keys": sorted({end for _, _, end in parts})}
        layers = (
            int(self.pair.backbone.config.get("num_hidden_layers", 0)) or max(int(number) for _, number, _ in parts) + 1
        )
        return {
            "model": self.base_model,
            "fine_tune_type": "lora",
            "num_layers": layers,
            "lora_parameters": parameters,
        }
