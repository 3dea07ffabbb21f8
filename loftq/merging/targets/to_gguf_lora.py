"""`loftq merge --to gguf-lora`: the adapter of `--to lora` as a GGUF file, for llama.cpp's `--lora`."""

from __future__ import annotations

import shutil

from loftq.artifacts.staging import Staging, open_staging
from loftq.errors import OptionError
from loftq.formats.model_config import config_text
from loftq.merging.llama_cpp import LlamaCpp
from loftq.merging.targets.to_lora import PlainLora

CONVERTER = "convert_lora_to_gguf.py"
_PEFT = "peft"  # the folder of the adapter in peft's format, in the partial folder


class GgufLora(PlainLora):
    """The adapter of `--to lora`, converted by llama.cpp's own script."""

    name = "gguf-lora"
    suffix = ".gguf"
    uses = (*PlainLora.uses, "llama_cpp")
    holds_experts = False

    def check(self) -> None:
        """Return None. Raises OptionError also for what is no factor, and where the script is missing."""
        super().check()
        saved = sorted(self.pair.adapter.saved)
        if saved:
            raise OptionError(f"--to gguf-lora holds only factors, and this adapter also has {saved[0]}: use --to lora")
        self._tools.script(CONVERTER)

    def write(self, staging: Staging) -> None:
        """Write the adapter in peft's format, convert it, and remove the first."""
        folder, file = staging.folder / _PEFT, f"{self.pair.adapter.folder.resolve().name}-lora.gguf"
        with open_staging(folder, self.fingerprint(), overwrite=True) as inner:
            super().write(inner)
            inner.publish()
        config = {key: value for key, value in self.pair.config.items() if key != "quantization_config"}
        base = folder / "base"  # the script reads the model's config.json, and knows no quantized models
        base.mkdir()
        (base / "config.json").write_text(config_text(config), encoding="utf-8")
        self._tools.convert(CONVERTER, folder, staging.folder / file, "F32", "--base", str(base))
        shutil.rmtree(folder)
        staging.hashes[file] = None
        self.write_manifest(staging, "adapter")

    @property
    def _tools(self) -> LlamaCpp:
        return LlamaCpp.of(self.settings.llama_cpp)
