"""`loftq merge --to gguf`: one GGUF file of a type that llama.cpp's own quantizer writes, with an Ollama Modelfile.

The model is merged into 16 bits first, beside the result, and its logits are compared there. llama.cpp's converter and
quantizer make the file from it, and the 16-bit model is removed.
"""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path

from loftq.artifacts.staging import Staging, open_staging
from loftq.errors import ArtifactError
from loftq.formats.artifact import MANIFEST
from loftq.merging.gguf_maker import GgufMaker
from loftq.merging.logits import checked_difference, discard
from loftq.merging.target import Target
from loftq.merging.targets.to_bf16 import Dense

_DENSE = "dense"  # the folder of the 16-bit model in the partial folder


class GgufFile(Target):
    """A GGUF file of any type, for every model that llama.cpp reads."""

    name = "gguf"
    suffix = ".gguf"
    any_backbone = True
    uses = ("gguf_type", "llama_cpp")

    def check(self) -> None:
        """Return None. Raises OptionError for an unknown type, and where a tool of llama.cpp is missing."""
        self._maker.check()

    @property
    def planned_bytes(self) -> int:
        """The bytes of the 16-bit model, which is on the disk while the file is made."""
        return Dense(self.pair, self.settings, self.run).planned_bytes

    def write(self, staging: Staging) -> None:
        """Merge into 16 bits, compare the logits, convert, quantize, and write the small files."""
        folder = staging.folder / _DENSE
        staging.note(_DENSE, {"written": {}})  # so that an interrupted run finds the merged tensors again
        staging.flush()
        self._write_dense(folder, staging)
        self._maker.make(folder, staging, self.pair.backbone.folder.name)
        shutil.rmtree(folder)
        self.write_manifest(staging, "gguf")

    def _write_dense(self, folder: Path, staging: Staging) -> None:
        """Write the 16-bit model. Raises ArtifactError, and removes everything, if it answers otherwise."""
        dense = Dense(self.pair, self.settings, self.run)
        if (folder / MANIFEST).is_file():
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

    @cached_property
    def _maker(self) -> GgufMaker:
        return GgufMaker.of(self.settings)
