"""GPTQ folders in stock transformers with gptqmodel, which has an environment of its own: its pins are not ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import pico_llama, save_model
from picos import save_pico

import loftq

PINS = ["torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "gptqmodel==7.6.0", "optimum==2.3.0"]
OURS = ["bitsandbytes==0.50.2", "numba", "scipy", "click"]  # what loftq needs besides
ROOT = Path(__file__).parents[2]
LOAD = """
import json, sys, torch, transformers
from peft import PeftModel

folder = sys.argv[1]
name = json.load(open(folder + "/config.json"))["architectures"][0]
model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32)
weights = {}
for module, linear in model.named_modules():
    if hasattr(linear, "qweight"):
        with torch.no_grad():
            out = linear(torch.eye(linear.in_features))
        weights[module] = (out - (0 if linear.bias is None else linear.bias)).T.contiguous().float()
torch.save(weights, sys.argv[2])
model = PeftModel.from_pretrained(model, folder, subfolder="loftq_init", is_trainable=True)
tokens = torch.arange(20).view(2, 10)
found = model(input_ids=tokens, labels=tokens) if "CausalLM" in name else model(input_ids=tokens)
(found.loss if "CausalLM" in name else found.logits.square().mean()).backward()
grads = [p.grad.norm().item() for n, p in model.named_parameters() if "lora_B" in n and p.grad is not None]
assert "loftq" not in sys.modules and grads and min(grads) > 0, grads
print("trained", type(next(m for m in model.modules() if hasattr(m, "qweight"))).__name__)
"""


BOTH = """
import sys, torch, loftq

tokens = torch.arange(16).unsqueeze(0)
found = []
for backend in ("loftq", "gptqmodel"):
    model = loftq.load_qalora(sys.argv[1], sys.argv[2], backend=backend, dtype=torch.float32)
    model.eval()
    with torch.no_grad():
        found.append(model(tokens).logits.double())
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad.norm() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    kind = next(type(m).__name__ for m in model.modules() if hasattr(m, "qweight"))
    assert (kind == "GptqLinear") == (backend == "loftq"), kind
print("difference", float((found[0] - found[1]).norm() / found[0].norm()))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with gptqmodel: the one of LOFTQ_GPTQMODEL_PYTHON, or a new one, where pip can make it."""
    if "LOFTQ_GPTQMODEL_PYTHON" in os.environ:
        return os.environ["LOFTQ_GPTQMODEL_PYTHON"]
    folder = tmp_path_factory.mktemp("gptqmodel")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [str(folder / "bin" / "pip"), "install", "-q"]
    steps = (PINS[:1], ["setuptools", "wheel"], ["--no-build-isolation", *PINS], OURS, ["--no-deps", "-e", str(ROOT)])
    for packages in steps:
        done = subprocess.run([*pip, *packages], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"gptqmodel cannot be installed here: {done.stderr[-300:]}")
    return str(folder / "bin" / "python")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "zero", "group"),
    [(2, "integer", 32), (3, "integer", 64), (3, "symmetric", -1), (4, "symmetric", 64), (8, "integer", 32)],
)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_stock_loaders_read_the_same_weights(
    name: str, bits: int, zero: str, group: int, python: str, tmp_path: Path
) -> None:
    """Oracle: gptqmodel's own forward of the identity, in a process that never imports loftq."""
    import torch

    source = (
        save_model(pico_llama(), tmp_path / "source")
        if name == "llama"
        else save_pico(name, "masked-lm", tmp_path / "source")
    )
    options = {"bits": bits, "quant_type": "int", "zero_point": zero, "group_size": group, "format": "gptq"}
    report = loftq.quantize(str(source), output=tmp_path / "out", rank=4, iters=2, quiet=True, **options)
    done = subprocess.run([python, "-c", LOAD, report.folder, tmp_path / "weights.pt"], capture_output=True, text=True)
    assert "trained" in done.stdout, done.stderr[-2000:]
    theirs = torch.load(tmp_path / "weights.pt", weights_only=True)
    ours = loftq.load_qlora(report.folder, dtype=torch.float32).base_model.model
    names = [row["name"] for row in json.loads((report.folder / "loftq.json").read_text())["layers"]]
    assert sorted(theirs) == sorted(names)
    for module in names:
        weight = ours.get_submodule(module).base_layer.dequantize()
        assert (theirs[module] - weight).norm() < 0.004 * weight.norm()  # its kernels multiply in 16 bits


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4])
def test_pefts_qalora_on_gptqmodel_is_ours(bits: int, python: str, tmp_path: Path) -> None:
    """Oracle: each other. peft's layer on gptqmodel's linears, and ours, from the same two folders."""
    import torch

    source = save_model(pico_llama(), tmp_path / "source")
    options = {"adapter": "qalora", "bits": bits, "group_size": 32, "format": "gptq", "rank": 2, "quiet": True}
    folder = loftq.quantize(str(source), output=tmp_path / "out", **options).folder
    model = loftq.load_qalora(folder)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(tmp_path / "trained")
    eager = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}  # gptqmodel compiles at its first forward, a minute each
    done = subprocess.run([python, "-c", BOTH, folder, tmp_path / "trained"], capture_output=True, text=True, env=eager)
    said = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("difference")]
    assert said, done.stderr[-2000:]
    assert float(said[0]) < 0.01  # its kernels multiply in 16 bits
