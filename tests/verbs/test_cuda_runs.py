"""Whole runs on a GPU. Oracles: `verify`, which reads the files on the CPU, and the same run there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pico_llama, save_model
from test_calibrated_runs import LENGTH, TEXT, TOKENS, louder
from torch import nn

import loftq
from loftq.calibration import windows
from loftq.core.solvers.methods import METHODS

RUNS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "nested": {"double_quant": True},
    "nf2": {"bits": 2, "alpha": 8},
    "int8": {"bits": 8},
    "gptq": {"bits": 3, "quant_type": "int", "group_size": 32},
    "budget": {"bits": 2.5},
    "qalora": {"adapter": "qalora", "group_size": 32, "rank": 2},
    "exact": {"svd": "exact"},
    "plain": {"iters": 0},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama that has something to lose."""
    return save_model(louder(pico_llama(tie_word_embeddings=False)), tmp_path_factory.mktemp("model") / "pico")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "MIN_TOKENS", 512)


@pytest.mark.parametrize("run", RUNS)
def test_a_run_is_the_cpus(run: str, model: Path, tmp_path: Path, cuda: torch.device) -> None:
    options = {"rank": 4, "quiet": True, **RUNS[run]}
    found = loftq.quantize(str(model), output=tmp_path / "gpu", device=cuda, workers=2, **options)
    expected = loftq.quantize(str(model), output=tmp_path / "cpu", **options)
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert ours["error"] == pytest.approx(theirs["error"], rel=0.02)
    assert not loftq.verify(found.folder, source=str(model)).problems


@pytest.mark.parametrize("method", METHODS)
def test_a_calibrated_run_is_the_cpus(method: str, model: Path, text: Path, tmp_path: Path, cuda: torch.device) -> None:
    """The GPU's model runs in bfloat16, so that its statistics differ a little."""
    options: dict[str, Any] = {"rank": 4, "method": method, "refine": 0, "quiet": True, "calibration": text}
    options |= {"calibration_tokens": TOKENS, "sequence_length": LENGTH}
    found = loftq.quantize(str(model), output=tmp_path / "gpu" / "out", device=cuda, **options)
    expected = loftq.quantize(str(model), output=tmp_path / "cpu" / "out", **options)
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert ours["output_error"] == pytest.approx(theirs["output_error"], rel=0.1)
    assert not loftq.verify(found.folder, source=str(model)).problems


@pytest.mark.parametrize("bits", [2, 4])
def test_refining_brings_it_nearer(bits: int, model: Path, text: Path, tmp_path: Path, cuda: torch.device) -> None:
    options: dict[str, Any] = {"calibration": text, "calibration_tokens": TOKENS, "sequence_length": LENGTH}
    report = loftq.quantize(
        str(model), output=tmp_path / "out", device=cuda, bits=bits, rank=4, refine=16, quiet=True, **options
    )
    totals = report.totals
    assert totals["refine_steps"] == 16
    assert totals["divergence"] < totals["divergence_before"]
    assert not loftq.verify(report.folder, source=str(model)).problems


def test_the_same_run_gives_the_same_bytes(model: Path, tmp_path: Path, cuda: torch.device) -> None:
    """On one machine, whatever the number of workers."""
    for name, workers in (("a", 1), ("b", 3)):
        loftq.quantize(str(model), output=tmp_path / name, device=cuda, workers=workers, rank=4, quiet=True)
    for file in ("model.safetensors", "loftq_init/adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_network_in_memory(bits: int, cuda: torch.device) -> None:
    """Oracle: the network as it was."""
    network = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)).to(cuda)
    x = torch.randn(32, 128, device=cuda)
    wanted = network(x).detach()
    model = loftq.quantize_model(network, bits=bits, rank=32, iters=5)
    assert {p.device.type for p in model.parameters()} == {cuda.type}
    assert (model(x) - wanted).norm() < 0.6 * wanted.norm()
    model(x).square().mean().backward()
