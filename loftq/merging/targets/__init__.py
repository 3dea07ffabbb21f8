"""The targets of `loftq merge --to` by name. Each has its own file, which is imported when the target is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from loftq.tables import LazyTable

if TYPE_CHECKING:
    from loftq.merging.target import Target


class Row(NamedTuple):
    """A row of the table: `file:Class` in this package, and the line of `loftq merge --help`."""

    place: str
    text: str


ROWS = {
    "bf16": Row("to_bf16:Dense", "a dense model: any adapter, any backbone"),
    "compressed-tensors": Row(
        "to_compressed_tensors:CompressedTensors",
        "integers of 4 or 8 bits in groups: any adapter, any backbone; for vLLM and SGLang",
    ),
    "gguf": Row(
        "to_gguf:GgufFile",
        "one GGUF file by llama.cpp's own quantizer: any adapter and backbone, or a dense model without an adapter",
    ),
    "int": Row("to_int:Integers", "QA-LoRA in the zero-points, exactly: the same codes, in our own format"),
    "mlx": Row("to_mlx:Mlx", "QA-LoRA in the biases of MLX's affine layout, exactly: for mlx-lm"),
    "gguf-q4_1": Row(
        "to_gguf_q4_1:Gguf", "QA-LoRA of 4 bits in the minima of one GGUF file, to their 16 bits: for llama.cpp"
    ),
    "gptq": Row(
        "to_gptq:Rounded",
        "a plain LoRA and its backbone as integers of 2 to 8 bits; QA-LoRA in whole zero-points, which lose most of it "
        "(--allow-rounding)",
    ),
    "lora": Row(
        "to_lora:PlainLora",
        "the adapter alone: LoftQ's for the full-precision model, QA-LoRA as a plain LoRA; for any LoRA server",
    ),
    "mlx-lora": Row("to_mlx_lora:MlxLora", "the adapter of --to lora for mlx-lm (`--adapter-path`)"),
    "gguf-lora": Row(
        "to_gguf_lora:GgufLora",
        "the adapter of --to lora in one GGUF file, for llama.cpp (`--lora`) and Ollama (`ADAPTER`)",
    ),
}
TARGETS: Mapping[str, type[Target]] = LazyTable({name: f"{__name__}.{row.place}" for name, row in ROWS.items()})
