"""Codes stored as bfloat16 numbers. Oracles: the same folder with bytes, and the model before it is sharded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import loftq

TOKENS = torch.arange(6, 38).view(2, 16)
FORMATS = ("bitsandbytes", "bitsandbytes-fsdp")
_PROGRAM = """
import sys, torch
import torch.distributed as dist
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
dist.init_process_group("gloo")
base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(base, folder, subfolder="loftq_init", is_trainable=True).train()
tokens = torch.arange(6, 38).view(2, 16)
wanted = model(input_ids=tokens, labels=tokens).loss
wanted.backward()
grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
model.zero_grad()
mesh = init_device_mesh("cpu", (2,))
for layer in base.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
codes = base.model.layers[0].mlp.up_proj.base_layer.weight
assert 2 * codes.to_local().numel() == codes.numel(), codes.shape
found = model(input_ids=tokens, labels=tokens).loss
found.backward()
assert torch.equal(wanted, found), (wanted, found)
again = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
assert len(again) == 28 and all(torch.equal(grad, grads[name]) for name, grad in again.items())
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folders(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same start in both formats."""
    scratch = tmp_path_factory.mktemp("storage")
    options: dict[str, Any] = {"rank": 4, "iters": 1, "quiet": True}
    return {name: loftq.quantize(str(pico), output=scratch / name, format=name, **options).folder for name in FORMATS}


def test_stock_libraries_read_the_same_weights(folders: dict[str, Path]) -> None:
    logits = []
    for name, folder in folders.items():
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).train()
        weight = base.model.layers[0].mlp.up_proj.weight
        assert weight.dtype == (torch.uint8 if name == "bitsandbytes" else torch.bfloat16)
        model = PeftModel.from_pretrained(base, folder, subfolder="loftq_init")
        with torch.no_grad():
            logits.append(model(TOKENS).logits)
    assert torch.equal(*logits)


def test_every_command_reads_it(folders: dict[str, Path], tmp_path: Path) -> None:
    """Oracle: the dense merge of the same codes in bytes."""
    assert not loftq.verify(folders["bitsandbytes-fsdp"]).problems
    dense = [loftq.merge(folder, to="bf16", output=tmp_path / name, quiet=True) for name, folder in folders.items()]
    files = [(report.folder / "model.safetensors").read_bytes() for report in dense]
    assert files[0] == files[1]


@pytest.mark.slow
def test_two_processes_hold_half_of_the_codes_each(folders: dict[str, Path], tmp_path: Path) -> None:
    """Oracle: loss and gradients before sharding, to the last bit. FSDP 2 of torch, with gloo on a CPU."""
    script = tmp_path / "shard.py"
    script.write_text(_PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, folders["bitsandbytes-fsdp"]], capture_output=True, text=True, timeout=300, env=environment
    )
    assert ended.returncode == 0, ended.stderr
