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


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with gptqmodel: the one of LOFTQ_GPTQMODEL_PYTHON, or a new one, where pip can make it."""
    if "LOFTQ_GPTQMODEL_PYTHON" in os.environ:
        return os.environ["LOFTQ_GPTQMODEL_PYTHON"]
    folder = tmp_path_factory.mktemp("gptqmodel")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [str(folder / "bin" / "pip"), "install", "-q"]
    for packages in (PINS[:1], ["setuptools", "wheel"], ["--no-build-isolation", *PINS]):
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
