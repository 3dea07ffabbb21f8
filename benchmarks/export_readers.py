"""The readers of exports: the perplexity of what `loftq merge` wrote, by the libraries that it was written for.

Each takes what was written, the folder of the full-precision model, and windows (n, length) of token ids.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from perplexity import perplexity

import loftq
from loftq.formats.model_config import config_text, read_config, with_old_names

_LLAMA_CPP = """
import math, os, sys
import numpy as np
from cyllama.llama import llama_cpp
file, windows = sys.argv[1:]
class Model(llama_cpp.LlamaModel):  # with the size of its vocabulary, which the context of cyllama 0.2 asks for
    n_vocab = property(lambda self: self.get_vocab().n_vocab)
llama_cpp.disable_logging()
windows = np.load(windows)
length = windows.shape[1]
settings = llama_cpp.LlamaContextParams()
settings.n_ctx = settings.n_batch = settings.n_ubatch = length
settings.n_threads = settings.n_threads_batch = 1
context = llama_cpp.LlamaContext(Model(file, llama_cpp.LlamaModelParams()), settings)
loss = 0.0
for window in windows.tolist():
    context.kv_cache_clear()
    batch = llama_cpp.LlamaBatch(n_tokens=length, embd=0, n_seq_max=1)
    batch.set_batch(window, 0, True)
    context.decode(batch)
    for at, following in enumerate(window[1:]):
        row = np.array(context.get_logits_ith(at), dtype=np.float64)
        loss += row.max() + math.log(np.exp(row - row.max()).sum()) - row[following]
print(math.exp(loss / (len(windows) * (length - 1))), flush=True)
os._exit(0)
"""
_LLAMA_CPP_LORA = """
import math, sys
import numpy as np
from llama_cpp import Llama
file, windows, adapter = sys.argv[1:]
windows = np.load(windows)
length = windows.shape[1]
settings = {"n_ctx": length, "n_batch": length, "n_ubatch": length, "n_threads": 1, "n_threads_batch": 1}
model = Llama(file, lora_path=adapter, logits_all=True, verbose=False, **settings)
loss = 0.0
for window in windows.tolist():
    model.reset()
    model.eval(window)
    rows = model.scores[: length - 1].astype(np.float64)
    most = rows.max(axis=1, keepdims=True)
    sums = most[:, 0] + np.log(np.exp(rows - most).sum(axis=1))
    loss += float((sums - rows[np.arange(length - 1), window[1:]]).sum())
print(math.exp(loss / (len(windows) * (length - 1))))
"""
_MLX = """
import math, sys
import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.utils import dequantize_model
folder, windows, adapter = sys.argv[1:]
model, _ = load(folder, adapter_path=adapter or None)
model = dequantize_model(model)  # by MLX itself: its quantized kernels for CPUs take minutes for a window
model.set_dtype(mx.float32)
loss, windows = 0.0, np.load(windows)
for window in windows:
    logits = model(mx.array(window[None]))[0, :-1].astype(mx.float32)
    log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    loss -= float(mx.take_along_axis(log_p, mx.array(window[1:, None]), axis=-1).sum())
print(math.exp(loss / (len(windows) * (windows.shape[1] - 1))))
"""


def by_transformers(output: Any, source: Path, windows: torch.Tensor) -> float:
    """By transformers in float32, with peft for an adapter; `output` may also be a model."""
    model = _loaded(output, source) if isinstance(output, Path) else output
    return perplexity(model, windows.reshape(1, -1), *windows.shape)


def by_llama_cpp(output: Path, _: Path, windows: torch.Tensor) -> float:
    """By the library of llama.cpp in the package cyllama."""
    return _in_a_process(_LLAMA_CPP, windows, next(output.glob("*.gguf")))


def by_llama_cpp_with_lora(python: str, output: Path, source: Path, windows: torch.Tensor) -> float:
    """By the library of llama.cpp in the package llama-cpp-python: an adapter on the full-precision model in BF16."""
    with tempfile.TemporaryDirectory() as scratch:
        base = loftq.merge(source, to="gguf", gguf_type="BF16", output=Path(scratch) / "base", quiet=True, check=False)
        file = next(base.folder.glob("*.gguf"))
        return _in_a_process(_LLAMA_CPP_LORA, windows, file, next(output.glob("*.gguf")), python=python)


def by_mlx(output: Path, source: Path, windows: torch.Tensor) -> float:
    """By mlx-lm in float32, dequantized by MLX; an adapter on the full-precision model.

    That model gets the names of the rotary settings that mlx-lm reads.
    """
    if not (output / "adapters.safetensors").is_file():
        return _in_a_process(_MLX, windows, output, "")
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        for path in source.iterdir():
            (base / path.name).symlink_to(path)
        (base / "config.json").unlink()
        (base / "config.json").write_text(config_text(with_old_names(read_config(source))), encoding="utf-8")
        return _in_a_process(_MLX, windows, base, output)


def _in_a_process(code: str, windows: torch.Tensor, first: Path, *more: object, python: str = sys.executable) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "windows.npy"
        np.save(file, windows.numpy().astype(np.int32))
        command: list[object] = [python, "-c", code, first, file, *more]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.split()[-1])


def _loaded(output: Path, source: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    if (output / "adapter_config.json").is_file():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), output)
    entry = json.loads((output / "config.json").read_text()).get("quantization_config", {})
    packed = entry.get("quant_method") == "compressed-tensors"
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
    return AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32, **options)
