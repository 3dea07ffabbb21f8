"""What llama.cpp makes of a GGUF file, by its library in the package cyllama; run in a process of its own.

gguf_runner.py FILE OUT.npy WINDOWS.npy    the logits after each token of the windows (n, length)
"""

from __future__ import annotations

import os
import sys

import numpy as np
from cyllama.llama import llama_cpp


class Model(llama_cpp.LlamaModel):
    """A model with the size of its vocabulary, which the context of cyllama 0.2 asks for."""

    @property
    def n_vocab(self) -> int:
        return int(self.get_vocab().n_vocab)


def main(file: str, out: str, windows: str) -> None:
    """Decode each window at once."""
    llama_cpp.disable_logging()
    prompts = np.load(windows)
    length = prompts.shape[1]
    settings = llama_cpp.LlamaContextParams()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = length
    settings.n_threads = settings.n_threads_batch = 1
    context = llama_cpp.LlamaContext(Model(file, llama_cpp.LlamaModelParams()), settings)
    logits = []
    for prompt in prompts.tolist():
        context.kv_cache_clear()
        batch = llama_cpp.LlamaBatch(n_tokens=length, embd=0, n_seq_max=1)
        batch.set_batch(prompt, 0, True)
        context.decode(batch)
        logits.append([context.get_logits_ith(at) for at in range(length)])
    np.save(out, np.array(logits, dtype=np.float32))
    sys.stdout.flush()
    os._exit(0)  # the library's threads do not end by themselves


if __name__ == "__main__":
    main(*sys.argv[1:])
