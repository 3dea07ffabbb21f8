"""What llama.cpp makes of an adapter beside a GGUF file, by its library in the package llama-cpp-python.

gguf_lora_runner.py FILE ADAPTER OUT.npy TOKEN...    the logits after each token
"""

from __future__ import annotations

import sys

import numpy as np
from llama_cpp import Llama


def main(file: str, adapter: str, out: str, *tokens: str) -> None:
    """Read all tokens at once."""
    model = Llama(file, lora_path=adapter, n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    model.eval(list(map(int, tokens)))
    np.save(out, model.scores[: len(tokens)])


if __name__ == "__main__":
    main(*sys.argv[1:])
