"""The tokens that reach fused experts: recorded while the model runs, and kept on disk until the experts are solved.

The second moments of all experts of a layer would take over 1 GB (128 experts of 2,048 inputs). The layer's tokens, in
bfloat16 and with the experts that each was sent to, take about 4 KB each, and any expert's moment follows from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from loftq.errors import ArtifactError
from loftq.formats.disk import sync

PRIOR = 1.0  # part of the number of inputs: an expert with fewer tokens leans mostly on the tokens of its layer
_NAMES = ("tokens", "experts", "weights")


@dataclass(frozen=True)
class RoutedTokens:
    """The inputs of an experts module and the router's choices for them.

    `tokens` bfloat16 (tokens, width), `experts` int32 (tokens, k), and `weights` float32 (tokens, k), by which the
    outputs of these experts are multiplied. A number that is no expert's means that a choice was left out.
    """

    tokens: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of_call(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RoutedTokens:
        """Those of a call of an experts module, on the CPU: the three arguments of `integrations.moe`'s interface."""
        tokens, experts, weights = (*args, *kwargs.values())[:3]
        return cls(
            tokens.reshape(-1, tokens.shape[-1]).to("cpu", torch.bfloat16, copy=True),
            experts.reshape(-1, experts.shape[-1]).to("cpu", torch.int32, copy=True),
            weights.reshape(-1, weights.shape[-1]).to("cpu", torch.float32, copy=True),
        )

    @classmethod
    def joined(cls, parts: Sequence[RoutedTokens]) -> RoutedTokens:
        """Several batches as one."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in _NAMES))

    def counts(self, experts: int) -> list[int]:
        """The number of tokens that each of `experts` experts got."""
        chosen = self.experts.flatten().long()
        chosen = chosen[(chosen >= 0) & (chosen < experts)]
        return [int(count) for count in torch.bincount(chosen, minlength=experts)]

    def is_finite(self) -> bool:
        """Whether the tokens and their weights hold neither NaN nor Inf."""
        return bool(torch.isfinite(self.tokens).all()) and bool(torch.isfinite(self.weights).all())

    def write(self, path: Path) -> None:
        """Write a file that `read` reads, and wait until it is on the disk."""
        save_file({name: getattr(self, name).contiguous() for name in _NAMES}, path)
        sync(path)

    @classmethod
    def read(cls, path: Path, width: int, advice: str) -> RoutedTokens:
        """Read a file of tokens of `width` entries. Raises ArtifactError with `advice` at its end if it is damaged."""
        try:
            found = dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{path} is missing or damaged ({error}): {advice}") from error
        dtypes = {"tokens": torch.bfloat16, "experts": torch.int32, "weights": torch.float32}
        fits = {name: tensor.dtype for name, tensor in found.items()} == dtypes and (
            found["tokens"].shape == (len(found["experts"]), width)
            and found["experts"].ndim == 2
            and found["weights"].shape == found["experts"].shape
        )
        routed = cls(**found) if fits else None
        if routed is None or not routed.is_finite():
            raise ArtifactError(f"{path} is damaged (expected finite tokens of width {width}): {advice}")
        return routed
