"""`loftq merge --to gguf` of a model that is dense already: one of transformers, or one that was merged before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loftq.artifacts.manifest import origin_of, write_export_manifest
from loftq.artifacts.staging import Staging
from loftq.errors import OptionError
from loftq.formats.artifact import MANIFEST, open_artifact, read_artifact
from loftq.formats.checkpoint import read_checkpoint
from loftq.formats.model_config import FILE, read_config
from loftq.hub.source import side_files
from loftq.merging.export import Export
from loftq.merging.gguf_maker import GgufMaker
from loftq.merging.logits import discard
from loftq.merging.settings import MergeRun, MergeSettings
from loftq.merging.targets.to_gguf import GgufFile


class DenseGguf(Export):
    """A GGUF file of a dense model. Its logits are not compared: llama.cpp's converter reads the folder itself."""

    name = GgufFile.name
    suffix = GgufFile.suffix
    uses = GgufFile.uses

    def __init__(self, folder: Path, settings: MergeSettings, run: MergeRun) -> None:
        super().__init__(settings, run)
        self.folder = folder.resolve()
        self.artifact = open_artifact(folder) if (folder / MANIFEST).is_file() else None
        self.checkpoint = read_checkpoint(folder)
        self.maker = GgufMaker.of(settings)

    @property
    def layers(self) -> int:
        """No adapter is merged."""
        return 0

    def check(self) -> None:
        """Return None. Raises OptionError for an unknown type, and where a tool of llama.cpp is missing."""
        self.maker.check()

    @property
    def planned_bytes(self) -> int:
        """The bytes of a file of 16 bits, which is on the disk while the file is made."""
        return sum(spec.numel * 2 for spec in self.checkpoint.tensors.values())

    def notes(self) -> tuple[str, ...]:
        """Nothing is to be said."""
        return ()

    def made_from(self) -> dict[str, Any]:
        """The folder."""
        return {"model": str(self.folder)}

    def read_files(self) -> list[Path]:
        """The files of the model that the converter reads."""
        names = sorted({FILE, *self.checkpoint.files.values()})
        return [*(self.folder / name for name in names), *side_files(self.folder)]

    def write(self, staging: Staging) -> None:
        """Convert, quantize, and write the small files."""
        try:
            self.maker.make(self.folder, staging, self.folder.name)
        except OptionError:  # llama.cpp refuses the model, and would do so again
            discard(staging)
            raise
        known = self.artifact.manifest if self.artifact else None
        source = {"model": self.folder.name, "target": self.name, "adapter": None, **origin_of(self.folder, known)}
        write_export_manifest(
            staging, self.folder, source, "gguf", self.artifact.backbone_hash if self.artifact else ""
        )


def is_dense(folder: Path) -> bool:
    """Whether a folder holds a model without quantized linears: one of transformers, or a merged one of ours."""
    if not (folder / FILE).is_file():
        return False
    if (folder / MANIFEST).is_file():
        return read_artifact(folder).manifest.get("format") == "dense"
    return "quantization_config" not in read_config(folder)
