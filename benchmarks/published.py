"""The procedure as published, to be timed beside ours: bitsandbytes rounding and a full SVD at each iteration.

peft's own function of this kind needs CUDA, so its steps are written out: quantize the weight less the
adapter's product, dequantize, factor what is left by `torch.linalg.svd`, in float32.
"""

from __future__ import annotations

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit


def published(weight: torch.Tensor, rank: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dequantized backbone (out, in), B (out, rank), A (rank, in) after `iterations` alternations."""
    product: torch.Tensor | float = 0.0
    for _ in range(iterations):
        codes, state = quantize_4bit((weight - product).contiguous(), quant_type="nf4", blocksize=64)
        backbone = dequantize_4bit(codes, state)
        u, s, vh = torch.linalg.svd(weight - backbone, full_matrices=False)
        root = s[:rank].sqrt()
        b, a = u[:, :rank] * root, root.unsqueeze(1) * vh[:rank]
        product = b @ a
    return backbone, b, a
