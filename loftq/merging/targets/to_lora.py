"""`loftq merge --to lora`: converts a QA-LoRA adapter to a plain LoRA."""

from __future__ import annotations

import torch

from loftq.artifacts.manifest import write_export_manifest
from loftq.artifacts.staging import Staging
from loftq.core import pooled
from loftq.errors import OptionError
from loftq.formats import adapter as adapters
from loftq.formats.checkpoint import TensorSpec, lay_out
from loftq.formats.schema import json_text
from loftq.merging.target import Target


class PlainLora(Target):
    """Only the adapter: each column of A is repeated for every input of its pool."""

    name = "lora"
    text = "a QA-LoRA adapter as a plain LoRA, for any LoRA server"

    def check(self) -> None:
        """Return None. Raises OptionError if the adapter is already a plain LoRA."""
        self._pool_size()

    def _pool_size(self) -> int:
        adapter = self.pair.adapter
        if adapter.pool_size is None:
            raise OptionError(f"{adapter.folder} is already a plain LoRA, which any LoRA server can load")
        return adapter.pool_size

    def write(self, staging: Staging) -> None:
        """Write the weights and the configuration of the adapter."""
        adapter, pool = self.pair.adapter, self._pool_size()
        config = {key: value for key, value in adapter.config.items() if key not in ("use_qalora", "qalora_group_size")}
        ends = {name: name.rpartition(".lora_A.")[1] for name in adapter.shapes}
        specs = [
            TensorSpec(name, torch.float32, (shape[0], shape[1] * pool) if ends[name] else shape)
            for name, shape in adapter.shapes.items()
        ]
        shards = lay_out([specs], sum(spec.nbytes for spec in specs) + 1, adapters.WEIGHTS)
        with staging.writing(shards) as writer:
            for name in adapter.shapes:
                tensor = adapter.read(name).float()
                digest = writer.write(name, pooled.plain_lora(tensor, pool) if ends[name] else tensor)
                staging.note(name, {"written": {name: digest}})
        staging.write_text(adapters.CONFIG, json_text(config, indent=2, sort_keys=True) + "\n")
        write_export_manifest(staging, self.pair.backbone, "adapter")
