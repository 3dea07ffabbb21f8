"""Makes one GGUF file and its Ollama Modelfile from the folder of a model in 16 bits, by llama.cpp's own tools."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from loftq.artifacts.staging import Staging
from loftq.errors import OptionError, UnknownNameError
from loftq.merging.llama_cpp import CONVERTED, TYPES, LlamaCpp
from loftq.merging.modelfile import MODELFILE, modelfile
from loftq.merging.settings import MergeSettings

CONVERTER = "convert_hf_to_gguf.py"


@dataclass(frozen=True)
class GgufMaker:
    """The type of the file, and the tools that make it."""

    kind: str
    tools: LlamaCpp

    @classmethod
    def of(cls, settings: MergeSettings) -> GgufMaker:
        """The type and the tools that the settings name."""
        return cls((settings.gguf_type or "Q4_K_M").upper(), LlamaCpp.of(settings.llama_cpp))

    def check(self) -> None:
        """Raise OptionError for a type that is not written here, and where a tool of llama.cpp is missing."""
        if self.kind.startswith(("IQ1", "IQ2", "IQ3", "TQ")):
            raise OptionError(
                f"--gguf-type {self.kind}: llama.cpp writes it only with an importance matrix, which is not made here: "
                f"use Q3_K_M or Q2_K, or IQ4_XS"
            )
        if self.kind not in TYPES:
            raise UnknownNameError("GGUF type", self.kind, TYPES)
        self.tools.script(CONVERTER)
        if importlib.util.find_spec("gguf") is None:
            raise OptionError("--to gguf needs the gguf package: pip install gguf")
        if self.kind not in CONVERTED:
            self.tools.check_quantizer()

    def make(self, folder: Path, staging: Staging, name: str) -> None:
        """Write `NAME-TYPE.gguf` and the Modelfile. Raises OptionError with llama.cpp's own reason."""
        file = staging.folder / f"{name}-{self.kind}.gguf"
        if self.kind in CONVERTED:
            self.tools.convert(CONVERTER, folder, file, self.kind)
        else:
            whole = staging.folder / "16-bit.gguf"
            self.tools.convert(CONVERTER, folder, whole, "BF16")
            self.tools.quantize(whole, file, self.kind)
            whole.unlink()
        staging.write_text(MODELFILE, modelfile(folder, file.name))
        staging.hashes[file.name] = None
