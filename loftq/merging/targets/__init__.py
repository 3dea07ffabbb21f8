"""The targets of `loftq merge --to` by name. Each has its own file."""

from __future__ import annotations

from collections.abc import Mapping

from loftq.merging.target import Target
from loftq.merging.targets.to_bf16 import Dense
from loftq.merging.targets.to_compressed_tensors import CompressedTensors
from loftq.merging.targets.to_gguf import GgufFile
from loftq.merging.targets.to_gguf_lora import GgufLora
from loftq.merging.targets.to_gguf_q4_1 import Gguf
from loftq.merging.targets.to_gptq import Rounded
from loftq.merging.targets.to_int import Integers
from loftq.merging.targets.to_lora import PlainLora
from loftq.merging.targets.to_mlx import Mlx
from loftq.merging.targets.to_mlx_lora import MlxLora

_ALL: tuple[type[Target], ...] = (
    Dense,
    CompressedTensors,
    GgufFile,
    Integers,
    Mlx,
    Gguf,
    Rounded,
    PlainLora,
    MlxLora,
    GgufLora,
)
TARGETS: Mapping[str, type[Target]] = {target.name: target for target in _ALL}
