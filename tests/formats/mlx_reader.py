"""What mlx makes of our files; run by a Python that has mlx and mlx-lm, which need not be the one of the tests.

mlx_reader.py dequantize FILE OUT BITS GROUP_SIZE   the weight of each linear: float32, in OUT.npz
mlx_reader.py logits FOLDER OUT TOKENS… [--adapter FOLDER]   logits for token ids: float32, in OUT.npz, and some types
"""

from __future__ import annotations

import sys

import mlx.core as mx
import numpy as np


def dequantize(file: str, out: str, bits: str, group_size: str) -> None:
    tensors = mx.load(file)
    found = {}
    for module in [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]:
        weight, scales, biases = (tensors[f"{module}.{part}"] for part in ("weight", "scales", "biases"))
        dense = mx.dequantize(weight, scales, biases, group_size=int(group_size), bits=int(bits))
        found[module] = np.array(dense)
    np.savez(out, **found)


def logits(folder: str, out: str, *tokens: str) -> None:
    from mlx_lm import load

    adapter = None
    if "--adapter" in tokens:
        *tokens, _, adapter = tokens
    model, tokenizer = load(folder, adapter_path=adapter)
    found = model(mx.array([[int(token) for token in tokens]]))
    kinds = [type(layer.self_attn.q_proj).__name__ for layer in model.model.layers]
    np.savez(
        out,
        logits=np.array(found.astype(mx.float32)),
        dtype=str(found.dtype),
        kinds=kinds,
        tokens=np.array(tokenizer.encode("Hello, world")),
    )


if __name__ == "__main__":
    {"dequantize": dequantize, "logits": logits}[sys.argv[1]](*sys.argv[2:])
