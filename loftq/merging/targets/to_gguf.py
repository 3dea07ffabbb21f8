"""`loftq merge --to gguf`: one GGUF file of a type that llama.cpp's own quantizer writes, with an Ollama Modelfile.

The model is merged into 16 bits first, beside the result, and its logits are compared there. llama.cpp's converter and
quantizer make the file from it, and the 16-bit model is removed.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from loftq.artifacts.manifest import write_export_manifest
from loftq.artifacts.merged_card import merged_card_text
from loftq.artifacts.staging import Staging, open_staging
from loftq.errors import ArtifactError, OptionError, UnknownNameError
from loftq.formats.artifact import CARD
from loftq.merging.llama_cpp import CONVERTED, TYPES, LlamaCpp
from loftq.merging.logits import checked_difference, discard
from loftq.merging.modelfile import MODELFILE, modelfile
from loftq.merging.target import Target
from loftq.merging.targets.to_bf16 import Dense

CONVERTER = "convert_hf_to_gguf.py"
_DENSE = "dense"  # the folder of the 16-bit model in the partial folder


class GgufFile(Target):
    """A GGUF file of any type, for every model that llama.cpp reads."""

    name = "gguf"
    suffix = ".gguf"
    any_backbone = True
    uses = ("gguf_type", "llama_cpp")

    def check(self) -> None:
        """Return None. Raises OptionError for an unknown type, and where a tool of llama.cpp is missing."""
        if self._type not in TYPES:
            raise UnknownNameError("GGUF type", self._type, TYPES)
        self._tools.script(CONVERTER)
        if importlib.util.find_spec("gguf") is None:
            raise OptionError("--to gguf needs the gguf package: pip install gguf")
        if self._type not in CONVERTED:
            self._tools.check_quantizer()

    @property
    def planned_bytes(self) -> int:
        """The bytes of the 16-bit model, which is on the disk while the file is made."""
        return Dense(self.pair, self.settings, self.run).planned_bytes

    def write(self, staging: Staging) -> None:
        """Merge into 16 bits, compare the logits, convert, quantize, and write the small files."""
        name = f"{self.pair.backbone.folder.name}-{self._type}.gguf"
        folder, file = staging.folder / _DENSE, staging.folder / name
        staging.note(_DENSE, {"written": {}})  # so that an interrupted run finds the merged tensors again
        staging.flush()
        self._write_dense(folder, staging)
        if self._type in CONVERTED:
            self._tools.convert(CONVERTER, folder, file, self._type)
        else:
            whole = staging.folder / "16-bit.gguf"
            self._tools.convert(CONVERTER, folder, whole, "BF16")
            self._tools.quantize(whole, file, self._type)
            whole.unlink()
        staging.write_text(MODELFILE, modelfile(folder, name))
        shutil.rmtree(folder)
        lines = f"# llama-server -m {name}\n# ollama create my-model -f {MODELFILE}"
        text = merged_card_text(self.pair.backbone, self.pair.adapter.kind, self.name, lines)
        staging.write_text(CARD, text)
        staging.hashes[name] = None
        write_export_manifest(staging, self.pair.backbone, "gguf")

    def _write_dense(self, folder: Path, staging: Staging) -> None:
        """Write the 16-bit model. Raises ArtifactError, and removes everything, if it answers otherwise."""
        dense = Dense(self.pair, self.settings, self.run)
        if (folder / "loftq.json").is_file():
            return
        with open_staging(folder, self.fingerprint(), overwrite=False) as inner:
            if not inner.ready:
                dense.write(inner)
                if self.run.check:
                    try:
                        self.difference = checked_difference(dense, inner)
                    except ArtifactError:
                        discard(staging)
                        raise
            inner.publish()

    @property
    def _type(self) -> str:
        return (self.settings.gguf_type or "Q4_K_M").upper()

    @property
    def _tools(self) -> LlamaCpp:
        checkout = self.settings.llama_cpp
        return LlamaCpp(None if checkout is None else Path(checkout).expanduser())
