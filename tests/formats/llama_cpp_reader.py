"""What llama.cpp makes of our files; run by a Python that has xllamacpp and cyllama, not necessarily that of the tests.

llama_cpp_reader.py FILE OUT TEXT TOKENS…    log-probabilities after token ids, by id, and the ids of TEXT, in OUT.npz
"""

from __future__ import annotations

import os
import sys

import numpy as np
import xllamacpp
from cyllama.llama import llama_cpp


def log_probabilities(file: str, tokens: list[int], vocab_size: int, letter: int) -> np.ndarray:
    """What the model says, before any sampling. It is made to answer a letter: for an end or half a character the
    server says nothing."""
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel, options.warmup = file, 64, 1, False
    forced = {"temperature": 0.0, "logit_bias": [[letter, 1000.0]]}
    asked = {"prompt": tokens, "max_tokens": 1, "logprobs": vocab_size, **forced}
    found = xllamacpp.Server(options).handle_completions(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    values = np.full(vocab_size, np.nan)
    values[[each["id"] for each in found]] = [each["logprob"] for each in found]
    return values


def main(file: str, out: str, text: str, *tokens: str) -> None:
    model = llama_cpp.LlamaModel(file, llama_cpp.LlamaModelParams())
    vocab = model.get_vocab()
    letter = vocab.tokenize("a", False, False)[-1]
    found = log_probabilities(file, [int(token) for token in tokens], vocab.n_vocab, letter)
    np.savez(out, log_probabilities=found, ids=vocab.tokenize(text, True, True), context=model.n_ctx_train)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # the server's threads do not end by themselves
