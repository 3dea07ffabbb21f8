"""Quantized linears and loaders on a GPU. Oracles: numpy's reading, dense linears, the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import read_linear
from peft import PeftModel
from test_packed_linear import TYPES, inputs_for, make, make_gptq
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import loftq
from loftq.models import packed_linear
from loftq.models.packed_linear import PackedLinear

TOKENS = torch.tensor([[11, 42, 7, 99, 3, 250, 17, 5, 64, 128]])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FOLDERS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "nf4, nested": {"double_quant": True},
    "int8": {"bits": 8},
    "nf2": {"bits": 2},
    "nf3, nested": {"bits": 3, "double_quant": True},
    "gptq": {"bits": 4, "quant_type": "int", "group_size": 32},
    "2.5 bits": {"bits": 2.5},
}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("out", "inputs", "block"), [(96, 128, 64), (7, 24, 8), (3, 1000, -1)])
@pytest.mark.parametrize(("codebook", "zero"), TYPES)
def test_weights_are_the_cpus(
    codebook: str, zero: str | None, out: int, inputs: int, block: int, double: bool, cuda: torch.device
) -> None:
    """Oracle: the compiled loops, bit for bit."""
    layer = make(out, inputs, codebook=codebook, zero=zero, double=double, block=block)
    expected = [layer.dequantize(dtype) for dtype in DTYPES]
    layer.to(cuda)
    for dtype, weight in zip(DTYPES, expected, strict=True):
        found = layer.dequantize(dtype)
        assert found.device.type == cuda.type
        assert torch.equal(found.cpu(), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("less", [0, 1])
@pytest.mark.parametrize(("out", "inputs", "block"), [(96, 128, 64), (32, 32, -1), (160, 96, 16)])
def test_gptq_weights_are_the_cpus(
    bits: int, ordered: bool, less: int, out: int, inputs: int, block: int, cuda: torch.device
) -> None:
    """Oracle: the compiled loops, bit for bit, in both versions and any order of groups."""
    layer = make_gptq(out, inputs, bits, block)
    layer.less, layer.ordered = less, ordered
    if not ordered:
        layer.g_idx.copy_(layer.g_idx[torch.randperm(inputs)])
    expected = [layer.dequantize(dtype) for dtype in DTYPES]
    layer.to(cuda)
    for dtype, weight in zip(DTYPES, expected, strict=True):
        assert torch.equal(layer.dequantize(dtype).cpu(), weight)


@pytest.mark.parametrize(("codebook", "zero"), [*TYPES, ("gptq", None)])
@pytest.mark.parametrize("part", [1 << 24, 2000])
def test_forward_and_backward_are_a_dense_linears(
    codebook: str, zero: str | None, part: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: `nn.Linear` of the same weight on the CPU, in float32."""
    monkeypatch.setattr(packed_linear, "PART", part)
    layer = make_gptq() if codebook == "gptq" else make(codebook=codebook, zero=zero)
    dense = nn.Linear(128, 96)
    dense.weight.data, dense.bias = read_linear(layer), nn.Parameter(layer.bias.detach().clone())
    x, y = inputs_for(layer).detach().to(cuda).requires_grad_(), inputs_for(layer)
    layer.to(cuda)
    assert (layer(x).cpu() - dense(y)).norm() <= 1e-5 * dense(y).norm()
    layer(x).square().sum().backward()
    dense(y).square().sum().backward()
    assert (x.grad.cpu() - y.grad).norm() <= 1e-5 * y.grad.norm()


@pytest.mark.filterwarnings("ignore")  # torch's compiler of itself
@pytest.mark.parametrize("kind", ["nf3", "nested", "int3", "gptq"])
def test_compiles_in_one_graph(kind: str, cuda: torch.device) -> None:
    """Oracle: the layer as it is. By torch's own compiler, kernels and all."""
    layer = {
        "nf3": lambda: make(),
        "nested": lambda: make(double=True),
        "int3": lambda: make(codebook="int3", zero="integer"),
        "gptq": lambda: make_gptq(),
    }[kind]().to(cuda)
    compiled = torch.compile(layer, fullgraph=True)
    x = inputs_for(layer).detach().to(cuda).requires_grad_()
    y = x.detach().clone().requires_grad_()
    torch.testing.assert_close(compiled(x), layer(y))
    compiled(x).square().sum().backward()
    layer(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_autocast_decides_the_dtype(cuda: torch.device) -> None:
    layer = make().to(cuda)
    with torch.autocast(cuda.type, dtype=torch.bfloat16):
        assert layer(inputs_for(layer).to(cuda)).dtype == torch.bfloat16


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest, pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("folder") / "out"
    options = {"rank": 4, "iters": 2, "quiet": True, **FOLDERS[request.param]}
    return loftq.quantize(str(pico), output=out, **options).folder


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens.to(model.device)).logits.float().cpu()


@pytest.mark.parametrize("place", ["named", "auto", "by part"])
def test_folders_answer_as_on_the_cpu(folder: Path, place: str, cuda: torch.device) -> None:
    """Oracle: the CPU, in bfloat16 as well; and gradients that an evaluation leaves as they were."""
    expected = logits(loftq.load_qlora(folder, device_map="cpu"), TOKENS)
    maps: dict[str, Any] = {"named": str(cuda), "auto": "auto", "by part": {"": cuda}}
    model = loftq.load_qlora(folder, device_map=maps[place])
    assert {p.device.type for p in model.parameters()} == {cuda.type}
    found = logits(model, TOKENS)
    assert (found - expected).norm() <= 0.05 * expected.norm()
    gradients = []
    for _ in range(2):
        model.train()
        model.zero_grad()
        tokens = TOKENS.to(cuda)
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        logits(model, TOKENS)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_folder_goes_where_bitsandbytes_models_go(folder: Path, cuda: torch.device) -> None:
    """Without a device_map transformers loads bitsandbytes' 4 bits on the GPU: every folder, so that none surprises."""
    model = loftq.load_qlora(folder)
    assert {p.device.type for p in model.parameters()} == {cuda.type}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_the_originals_lines(pico: Path, tmp_path: Path, cuda: torch.device) -> None:
    """The snippet of the original's README, where there is a GPU; oracle: `load_qlora`."""
    folder = loftq.quantize(str(pico), output=tmp_path / "out", rank=4, quiet=True).folder
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=False,
        bnb_4bit_quant_type="nf4",
    )
    base = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16, quantization_config=config)
    model = PeftModel.from_pretrained(base, folder, subfolder="loftq_init", is_trainable=True)
    assert base.device.type == cuda.type
    expected = logits(loftq.load_qlora(folder, device_map=str(cuda)), TOKENS)
    assert (logits(model, TOKENS) - expected).norm() <= 0.02 * expected.norm()


def test_merging_gives_the_dense_weight(cuda: torch.device, pico: Path, tmp_path: Path) -> None:
    folder = loftq.quantize(str(pico), output=tmp_path / "out", bits=2, rank=4, quiet=True).folder
    model = loftq.load_qlora(folder, device_map=str(cuda), is_trainable=False, dtype=torch.float32)
    before = logits(model, TOKENS)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, PackedLinear) for module in merged.modules())
    torch.testing.assert_close(logits(merged, TOKENS), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", ["loftq", "gptq"])
def test_qalora_answers_as_on_the_cpu(format: str, pico: Path, tmp_path: Path, cuda: torch.device) -> None:
    """Oracle: the CPU, in float32."""
    options: dict[str, Any] = {"adapter": "qalora", "group_size": 32, "rank": 2, "format": format, "quiet": True}
    folder = loftq.quantize(str(pico), output=tmp_path / "out", **options).folder
    expected = logits(loftq.load_qalora(folder, device_map="cpu", dtype=torch.float32), TOKENS)
    model = loftq.load_qalora(folder, device_map=str(cuda), dtype=torch.float32)
    assert model.device.type == cuda.type
    torch.testing.assert_close(logits(model, TOKENS), expected, rtol=1e-3, atol=1e-4)
    tokens = TOKENS.to(cuda)
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
