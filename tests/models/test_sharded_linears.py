"""Packed linears whose codes are split over processes. Oracle: the same model, whole, to the last bit."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import loftq
from loftq.models.packed_linear import PackedLinear

POOLED: dict[str, Any] = {"adapter": "qalora", "group_size": 16}
FORMATS: dict[str, dict[str, Any]] = {
    "nf2": {"bits": 2, "iters": 1},
    "nf3, double": {"bits": 3, "iters": 1, "double_quant": True},
    "int3": {"bits": 3, "format": "loftq", **POOLED},
    "gptq": {"bits": 4, "format": "gptq", **POOLED},
    "trellis": {"bits": 2.25, "quant_type": "tcq", "iters": 1},
}
_BEGIN = """
import sys, torch, loftq
folder, kind = sys.argv[1:]
model = {"lora": loftq.load_qlora, "qalora": loftq.load_qalora}[kind](folder, device_map={"": "cpu"}).train()
base = model.base_model.model
tokens = torch.arange(6, 38).view(2, 16)
wanted = model(input_ids=tokens, labels=tokens).loss
wanted.backward()
grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
model.zero_grad()
linear = base.model.layers[0].mlp.up_proj.base_layer
codes = linear.qweight if hasattr(linear, "qweight") else linear.weight
values, kind = codes.numel(), codes.dtype
assert not kind.is_floating_point
"""
_FSDP = """
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
for layer in base.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
codes = linear.qweight if hasattr(linear, "qweight") else linear.weight
assert codes.dtype == kind and codes.to_local().numel() <= values / 2 + 1
found = model(input_ids=tokens, labels=tokens).loss
found.backward()
assert torch.equal(wanted, found), (wanted, found)
again = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
assert again.keys() == grads.keys() and all(torch.equal(grad, grads[name]) for name, grad in again.items())
dist.destroy_process_group()
"""
_ZERO = """
import deepspeed
deepspeed.init_distributed("gloo")
trained = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
options = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
options |= {"zero_force_ds_cpu_optimizer": False}
engine, *_ = deepspeed.initialize(model=model, optimizer=trained, config=options)
codes = linear.qweight if hasattr(linear, "qweight") else linear.weight
assert codes.ds_tensor.dtype == kind and codes.ds_tensor.numel() <= values / 2 + 1 and codes.numel() == 0
found = engine(input_ids=tokens, labels=tokens).loss
assert torch.equal(wanted, found), (wanted, found)
engine.backward(found)
engine.step()
assert engine(input_ids=tokens, labels=tokens).loss < found
"""
PROGRAMS = {"FSDP 2": _BEGIN + _FSDP, "ZeRO-3": _BEGIN + _ZERO}


def start(pico: Path, output: Path, options: dict[str, Any]) -> Path:
    return loftq.quantize(str(pico), output=output, rank=4, quiet=True, **options).folder


@pytest.mark.parametrize("name", ["nf2", "trellis"])
def test_codes_can_be_freed_after_a_forward(name: str, pico: Path, tmp_path: Path) -> None:
    """FSDP resizes their storage to nothing, which torch refuses once `Tensor.numpy` was called."""
    model = loftq.load_qlora(start(pico, tmp_path / "out", FORMATS[name]), device_map={"": "cpu"})
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(linears) == 14
    for linear in linears:
        linear.weight.data = linear.weight.data.clone()  # as gathered codes are, and not read from a file
    model(torch.arange(6, 38).view(2, 16))
    for linear in linears:
        linear.weight.untyped_storage().resize_(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "program"), [*((name, "FSDP 2") for name in FORMATS), ("nf2", "ZeRO-3"), ("trellis", "ZeRO-3")]
)
def test_two_processes_hold_half_of_the_codes_each(name: str, program: str, pico: Path, tmp_path: Path) -> None:
    if program == "ZeRO-3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    folder = start(pico, tmp_path / "out", FORMATS[name])
    script = tmp_path / "shard.py"
    script.write_text(PROGRAMS[program])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    ended = subprocess.run(
        [*command, folder, FORMATS[name].get("adapter", "lora")],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert ended.returncode == 0, ended.stderr
