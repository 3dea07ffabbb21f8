"""`loftq merge --to gguf-q4_1`: one file with the tokenizer in it, for llama.cpp."""

from __future__ import annotations

from math import prod

import torch
from tqdm import tqdm

from loftq.artifacts.staging import Staging
from loftq.core.affine import AffineWeight
from loftq.formats import gguf_q4_1
from loftq.formats.model_files import TOKENIZER
from loftq.merging.readers import gguf_notes
from loftq.merging.target import Target
from loftq.models.tasks import build_meta


class Gguf(Target):
    """A GGUF file whose Q4_1 minima contain the adapter."""

    name = "gguf-q4_1"
    suffix = ".gguf"

    def check(self) -> None:
        """Return None. Raises OptionError if GGUF cannot hold the backbone."""
        backbone = self.pair.backbone
        self.pair.require_pools()
        for bits, block in backbone.kinds:
            gguf_q4_1.check_linears(backbone.config, bits, block)

    def notes(self) -> tuple[str, ...]:
        """Notes for the user, also on settings of the model that the reader of the export does not read."""
        backbone = self.pair.backbone
        model, _ = build_meta(backbone.folder, task=backbone.task)
        return (*super().notes(), *gguf_notes(model, self.pair.config))

    @property
    def planned_bytes(self) -> int:
        """The bytes of the linears in Q4_1: 20 bytes for 32 weights."""
        return sum(prod(shape) * 20 // 32 for shape in self.pair.backbone.shapes.values())

    def write(self, staging: Staging) -> None:
        """Write the file, with a progress bar on stderr."""
        pair, kept = self.pair, self.kept
        backbone = pair.backbone
        bar = tqdm(total=len(kept) + len(backbone.grids), disable=self.run.quiet, dynamic_ncols=True)

        def linear(module: str) -> AffineWeight:
            bar.update()
            return pair.affine(module)

        def dense(name: str) -> torch.Tensor:
            bar.update()
            return pair.kept(name).to(kept[name].dtype)

        path = staging.folder / f"{backbone.folder.name}-q4_1.gguf"
        with bar:
            tokenizer = pair.side_files.get(TOKENIZER, backbone.folder / TOKENIZER).parent
            name = backbone.folder.name
            gguf_q4_1.write(path, pair.config, tokenizer, backbone.shapes, kept, linear, dense, name)
        staging.hashes[path.name] = None
        self.write_manifest(staging, "gguf")
