"""The packed linear: what it computes, what it keeps alive, how peft, autocast, compile and DDP take it.

Covers: loftq/models/custom_ops.py, loftq/models/peft_layers.py.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from grids import pairwise
from oracles import read_linear
from peft import LoraConfig, get_peft_model
from processes import start_python
from torch import nn
from torch.utils.checkpoint import checkpoint

import loftq
from loftq.core.grid import ROW, Grid
from loftq.core.kernels import dispatch
from loftq.models import packed_linear
from loftq.models.gptq_linear import GptqLinear
from loftq.models.packed_linear import PackedLinear
from loftq.models.peft_layers import PackedLoraLinear

CODEBOOKS = ["nf2", "nf3", "nf4"]
INTEGERS = ["int2", "int3", "int4", "int8"]
ZEROS = ["symmetric", "integer", "float"]
TYPES = [(name, None) for name in CODEBOOKS] + [(name, zero) for name in INTEGERS for zero in ZEROS]


def make(
    out: int = 96,
    inputs: int = 128,
    *,
    codebook: str = "nf3",
    bias: bool = True,
    double: bool = False,
    block: int = 64,
    zero: str | None = None,
) -> PackedLinear:
    """A packed linear of random codes and scales."""
    generator = torch.Generator().manual_seed(0)
    layer = PackedLinear(inputs, out, bias, grid=Grid(codebook, block, double, zero))
    layer.weight.data = torch.randint(256, layer.weight.shape, generator=generator).to(torch.uint8)
    if double:
        layer.weight_scales = torch.randint(256, layer.weight_scales.shape, generator=generator).to(torch.uint8)
        layer.weight_scales_absmax.fill_(0.05)
        layer.weight_scales_offset.fill_(0.06)
    else:
        layer.weight_scales = (torch.rand(layer.weight_scales.shape, generator=generator) / 8).half()
    if layer.weight_zeros is not None:
        layer.weight_zeros = torch.randint(256, layer.weight_zeros.shape, generator=generator).to(torch.uint8)
    if layer.weight_shifts is not None:
        layer.weight_shifts = torch.randn(layer.weight_shifts.shape, generator=generator).half()
    if bias:
        layer.bias.data = torch.randn(out, generator=generator)
    return layer


def make_gptq(out: int = 96, inputs: int = 128, bits: int = 3, block: int = 64, bias: bool = True) -> GptqLinear:
    """A linear of random codes, zero-points and scales in GPTQ's layout."""
    generator = torch.Generator().manual_seed(0)
    layer = GptqLinear(inputs, out, bias, grid=Grid(f"int{bits}", block, zero_point="integer"))
    for tensor in (layer.qweight.data, layer.qzeros):
        tensor.copy_(torch.randint(-(2**31), 2**31, tensor.shape, generator=generator))
    layer.scales.copy_(torch.rand(layer.scales.shape, generator=generator) / 8)
    layer.g_idx.copy_(torch.arange(inputs) // layer.grid.block(inputs))
    if bias:
        layer.bias.data = torch.randn(out, generator=generator)
    return layer


def inputs_for(layer: PackedLinear, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).requires_grad_()


@pytest.mark.parametrize(("codebook", "zero"), TYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("out", "inputs", "block"), [(96, 128, 64), (1, 64, 64), (7, 24, 8), (3, 40, 8), (5, 96, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_what_numpy_reads(
    codebook: str, zero: str | None, double: bool, out: int, inputs: int, block: int, dtype: torch.dtype
) -> None:
    """Oracle: the stream of bits read by numpy, in float64 where a sum rounds."""
    layer = make(out, inputs, codebook=codebook, zero=zero, double=double, block=block)
    found = layer.dequantize(dtype)
    assert found.shape == (out, inputs)
    wanted = read_linear(layer).to(dtype)
    if zero in (None, "symmetric") or (zero == "integer" and not double):
        assert torch.equal(found, wanted)
    else:
        torch.testing.assert_close(found, wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("codebook", INTEGERS)
@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("inputs", [24, 96, 1000])
def test_one_scale_a_row(codebook: str, zero: str, inputs: int) -> None:
    """Oracle: numpy's reading."""
    layer = make(5, inputs, codebook=codebook, zero=zero, block=ROW)
    assert len(layer.weight_scales) == 5
    torch.testing.assert_close(layer.dequantize(), read_linear(layer), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("out", "inputs", "block"), [(96, 128, 64), (32, 32, ROW), (64, 160, 32), (160, 96, 16)])
@pytest.mark.parametrize("part", [1 << 24, 1000])
def test_gptq_weights_are_what_numpy_reads(
    bits: int, out: int, inputs: int, block: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the words read by numpy, bit for bit."""
    monkeypatch.setattr(packed_linear, "PART", part)
    layer = make_gptq(out, inputs, bits, block)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(layer.dequantize(dtype), read_linear(layer).to(dtype))


@pytest.mark.parametrize(("codebook", "zero"), [*TYPES, ("gptq", None)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("part", [1 << 24, 2000])
def test_forward_and_backward_are_a_dense_linears(
    codebook: str, zero: str | None, bias: bool, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: `nn.Linear` of the same weight, also where the weight is unpacked in parts."""
    monkeypatch.setattr(packed_linear, "PART", part)
    layer = make_gptq(bias=bias) if codebook == "gptq" else make(codebook=codebook, zero=zero, bias=bias)
    dense = nn.Linear(128, 96, bias)
    dense.weight.data = read_linear(layer)
    dense.bias = layer.bias
    x, y = inputs_for(layer), inputs_for(layer)
    assert (layer(x) - dense(y)).norm() <= 2e-6 * dense(y).norm()
    layer(x).square().sum().backward()
    dense(y).square().sum().backward()
    assert (x.grad - y.grad).norm() <= 2e-6 * y.grad.norm()  # parts are summed in another order


@pytest.mark.parametrize(
    ("path", "out", "inputs", "block", "double", "codebook", "zero"),
    pairwise(["torch_path", "triton_path"], [(96, 128, 64), (7, 24, 8), (3, 1000, ROW)], [False, True], TYPES),
)
def test_other_devices_compute_the_same(
    codebook: str,
    zero: str | None,
    double: bool,
    out: int,
    inputs: int,
    block: int,
    path: str,
    request: pytest.FixtureRequest,
) -> None:
    """Oracle: the compiled loop, bit for bit. What other devices run is run here on the CPU."""
    layer = make(out, inputs, codebook=codebook, zero=zero, double=double, block=block)
    expected = [layer.dequantize(dtype) for dtype in (torch.float32, torch.float16)]
    request.getfixturevalue(path)
    for found in expected:
        assert torch.equal(layer.dequantize(found.dtype), found)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("less", "ordered"), [(0, True), (1, False)])
@pytest.mark.usefixtures("triton_path")
def test_kernels_read_gptq_as_the_loops_do(
    bits: int, less: int, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the compiled loop, bit for bit, in both versions, with groups in any order; in parts, too."""
    layer = make_gptq(96, 64, bits, 32)
    layer.less, layer.ordered = less, ordered
    if not ordered:
        layer.g_idx.copy_(layer.g_idx[torch.randperm(64)])
    for part in (1 << 24, 2500):
        monkeypatch.setattr(packed_linear, "PART", part)
        found = layer.dequantize()
        with monkeypatch.context() as compiled:
            compiled.setattr(dispatch, "on_cpu", lambda _: True)
            compiled.setattr(dispatch, "on_gpu", lambda _: False)
            assert torch.equal(found, layer.dequantize())


@pytest.mark.parametrize(("codebook", "zero"), [("nf3", None), ("int2", "integer"), ("gptq", None)])
@pytest.mark.usefixtures("triton_path")
def test_gradients_through_kernels(codebook: str, zero: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: `nn.Linear` of the same weight, in parts."""
    test_forward_and_backward_are_a_dense_linears(codebook, zero, True, 5000, monkeypatch)


@pytest.mark.parametrize(
    ("codebook", "zero", "rest"), [("nf2", None, 16), ("int2", "integer", 18), ("int2", "float", 32)]
)
def test_autograd_keeps_the_packed_form_alone(codebook: str, zero: str | None, rest: int) -> None:
    """Oracle: the bytes of the tensors that autograd asks to keep: codes, and `rest` bits a block."""
    layer = make(512, 512, codebook=codebook, zero=zero, bias=False)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        layer(inputs_for(layer))
    assert sum(t.numel() * t.element_size() for t in kept) == 512 * 512 * 2 // 8 + 512 * 512 // 64 * rest // 8
    own = {tensor.data_ptr() for tensor in layer.state_dict().values()}
    assert all(t.data_ptr() in own for t in kept)


@pytest.mark.parametrize(
    "layer",
    [make(), make(double=True), make(codebook="int4", zero="float"), make_gptq()],
    ids=["", "nested", "float", "gptq"],
)
def test_casts_leave_codes_and_scales(layer: PackedLinear) -> None:
    wanted = {name: tensor.clone() for name, tensor in layer.state_dict().items() if name != "bias"}
    for cast in (nn.Module.bfloat16, nn.Module.half, nn.Module.float, nn.Module.double):
        cast(layer)
        for name, tensor in wanted.items():
            found = getattr(layer, name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
    assert layer.bias.dtype == torch.float64


def test_state_dict_and_copies() -> None:
    layer = make()
    other = PackedLinear(128, 96, grid=Grid("nf3"))
    other.load_state_dict(layer.state_dict())
    x = inputs_for(layer)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(deepcopy(layer)(x), layer(x))
    assert layer.to("meta").weight_scales.is_meta


def test_autocast_decides_the_dtype() -> None:
    layer = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(inputs_for(layer)).dtype == torch.bfloat16
    assert layer(inputs_for(layer)).dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    """Oracle: the gradient without."""
    layer = make()
    x, y = inputs_for(layer), inputs_for(layer)
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    layer(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch of itself
@pytest.mark.parametrize(
    "layer",
    [
        make(),
        make(double=True),
        make(codebook="int3", zero="integer"),
        make(codebook="int8", zero="float"),
        make_gptq(),
    ],
    ids=["nf3", "nested", "int3", "int8", "gptq"],
)
def test_compiles_in_one_graph(layer: PackedLinear) -> None:
    """Oracle: the layer as it is."""
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, y = inputs_for(layer), inputs_for(layer)
    torch.testing.assert_close(compiled(x), layer(y))
    compiled(x).square().sum().backward()
    layer(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


class Network(nn.Module):
    """Two packed linears and a dense head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = make(128, 128), make_gptq(96, 128), nn.Linear(96, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


@pytest.mark.parametrize("targets", ["all-linear", ["first", "second"]])
def test_peft_attaches(targets: Any) -> None:
    network = Network()
    model = get_peft_model(network, LoraConfig(target_modules=targets, r=4))
    assert isinstance(network.first, PackedLoraLinear)
    assert isinstance(network.second, PackedLoraLinear)
    model(inputs_for(network.first.base_layer)).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    assert network.first.lora_B["default"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["nf3", "int4", "gptq"])
def test_a_merge_gives_the_dense_weight_and_comes_back(safe: bool, bias: bool, kind: str) -> None:
    """Oracle: the weight that numpy reads plus peft's own scaling times B·A."""
    zero = "float" if kind == "int4" else None
    network = nn.Sequential(make_gptq(bias=bias) if kind == "gptq" else make(bias=bias, codebook=kind, zero=zero))
    before = read_linear(network[0])
    model = get_peft_model(network, LoraConfig(target_modules=["0"], r=4, lora_alpha=8, init_lora_weights=False))
    layer = model.base_model.model[0]
    delta = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    x = inputs_for(layer.base_layer)
    wanted = model(x)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(layer.base_layer.weight, before + delta)
    assert (model(x) - wanted).norm() <= 2e-6 * wanted.norm()
    model.unmerge_adapter()
    assert isinstance(layer.base_layer, PackedLinear)
    assert torch.equal(model(x), wanted)
    merged = model.merge_and_unload(safe_merge=safe)
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged[0].weight, before + delta)
    assert (merged(x) - wanted).norm() <= 2e-6 * wanted.norm()


def test_a_dense_merge_by_hand_fails() -> None:
    """What expects a dense weight must not compute nonsense."""
    layer = make()
    with pytest.raises(RuntimeError):
        layer.weight.data += torch.randn(96, 128)


@pytest.mark.parametrize(
    ("options", "codebook"),
    [
        ({"bits": 2}, "nf2"),
        ({"bits": 3}, "nf3"),
        ({"bits": 2, "quant_type": "int"}, "int2"),
        ({"bits": 4, "quant_type": "int", "zero_point": "float", "group_size": 32}, "int4"),
        ({"bits": 8, "group_size": 64}, "int8"),
    ],
)
def test_any_network_in_memory(options: dict[str, Any], codebook: str) -> None:
    """Oracle: the errors of the parts, by numpy's reading."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(128, 192), nn.ReLU(), nn.Linear(192, 64))
    weights = [network[0].weight.detach().clone(), network[2].weight.detach().clone()]
    model = loftq.quantize_model(network, **options, rank=16, iters=3, alpha=32)
    for i, weight in zip((0, 2), weights, strict=True):
        layer = model.base_model.model[i]
        assert layer.base_layer.grid.codebook == codebook
        rounded = read_linear(layer.base_layer)
        adapted = rounded + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert (weight - adapted).norm() < 0.9 * (weight - rounded).norm()
    model(torch.randn(4, 128)).sum().backward()


DDP = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from peft import LoraConfig, get_peft_model
import loftq

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
model = DistributedDataParallel(loftq.quantize_model(network, bits=2, rank=4, iters=1))
torch.manual_seed(int(sys.argv[2]))
for _ in range(2):
    model(torch.randn(4, 64)).square().mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
                p.grad = None
total = sum(p.double().abs().sum() for p in model.parameters() if p.requires_grad)
print(total.item())
"""


def test_two_processes_train_the_same(tmp_path: Any) -> None:
    """Oracle: each other. They see different data, so only the exchange keeps them alike."""
    running = [start_python(DDP, tmp_path / "store", i) for i in (0, 1)]
    ended = [process.communicate(timeout=120) for process in running]
    sums = [out.strip() for out, _ in ended]
    assert sums[0], ended[0][1]
    assert sums[0] == sums[1]
