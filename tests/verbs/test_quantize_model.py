"""LoftQ on any module in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import pico_llama
from oracles import read_linear
from peft import PeftModel
from torch import nn

import loftq
from loftq.errors import OptionError


class Network(nn.Module):
    """Dense layers that are no transformer, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 128)
        self.middle = nn.Sequential(nn.ReLU(), nn.Linear(128, 128, bias=False), nn.ReLU())
        self.last = nn.Linear(128, 32)
        self.again = self.last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.middle(self.first(x)))


INPUTS = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))


def test_start_is_nearer_to_the_model_than_rounding_alone() -> None:
    """Oracle: the outputs of the network before, and bitsandbytes' own rounding."""
    wanted = Network()(INPUTS)
    rounded = loftq.quantize_model(Network(), lora=False)(INPUTS)
    model = loftq.quantize_model(Network(), rank=8, iters=5)
    assert isinstance(model, PeftModel)
    assert (model(INPUTS) - wanted).norm() < (rounded - wanted).norm()


def test_quantized_alone_is_what_bitsandbytes_rounds() -> None:
    before = Network()
    weight, bias = before.first.weight.data.clone(), before.first.bias
    model = loftq.quantize_model(before, ["first"], lora=False)
    assert model is before
    layer = model.first
    assert isinstance(layer, Linear4bit)
    assert layer.bias is bias
    assert torch.equal(
        dequantize_4bit(layer.weight.data, layer.weight.quant_state),
        dequantize_4bit(*quantize_4bit(weight, quant_type="nf4")),
    )
    assert type(model.last) is nn.Linear


def test_effective_weight_is_the_best_of_both() -> None:
    """Oracle: the original weight; with the scaling that peft applies."""
    original = Network().middle[1].weight.data.double()
    model = loftq.quantize_model(Network(), rank=8, alpha=2)
    layer = model.base_model.model.middle[1]
    assert layer.scaling["default"] == 0.25
    rounded = dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state).double()
    product = layer.lora_B["default"].weight.detach().double() @ layer.lora_A["default"].weight.detach().double()
    plain = dequantize_4bit(*quantize_4bit(original.float(), quant_type="nf4")).double()
    assert (original - rounded - 0.25 * product).norm() < 0.95 * (original - plain).norm()


def test_plain_lora_leaves_weights_and_outputs() -> None:
    before = Network()
    wanted = before(INPUTS)
    model = loftq.quantize_model(before, quantize=False, rank=4)
    assert not any(isinstance(module, Linear4bit) for module in model.modules())
    assert torch.equal(model(INPUTS), wanted)


def test_only_the_adapter_trains_and_loss_falls() -> None:
    model = loftq.quantize_model(Network(), rank=8)
    target = torch.randn(16, 32, generator=torch.Generator().manual_seed(2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (model(INPUTS) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(".lora_" in name for name in changed)


def test_never_quantized_twice() -> None:
    """Oracle: the codes of the first time. A shared layer is one layer."""
    model = loftq.quantize_model(Network(), lora=False)
    assert model.again is model.last
    codes = model.first.weight.data.clone()
    adapted = loftq.quantize_model(model, rank=4)
    layer = adapted.base_model.model.first
    assert torch.equal(layer.base_layer.weight.data, codes)
    assert (layer.lora_B["default"].weight == 0).all()
    assert adapted.base_model.model.again is adapted.base_model.model.last
    assert hasattr(adapted.base_model.model.again, "lora_A")
    with pytest.raises(OptionError, match="adapters already"):
        loftq.quantize_model(adapted, rank=4)


def test_int8_is_bitsandbytes() -> None:
    """Oracle: the outputs before; LLM.int8 rounds activations too, so it is not nearer than that."""
    wanted = Network()(INPUTS)
    model = loftq.quantize_model(Network(), bits=8, rank=8)
    layer = model.base_model.model.first
    assert isinstance(layer.base_layer, Linear8bitLt)
    assert (model(INPUTS) - wanted).norm() < 0.03 * wanted.norm()
    weight = Network().first.weight.detach()
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    rounded = read_linear(layer.base_layer)
    assert (weight - rounded - product).norm() < (weight - rounded).norm() < 0.01 * weight.norm()
    model(INPUTS).sum().backward()


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({"bits": 3, "allocation": "first"}, [4, 2, 2]),
        ({"bits": 3.75, "allocation": "first"}, [4, 4, 2]),
        ({"bits": 5, "zero_point": "float"}, None),
    ],
)
def test_budgets(options: dict[str, Any], widths: list[int] | None) -> None:
    """Oracle: the mean width over the weights, and the error of the narrowest."""
    model = loftq.quantize_model(Network(), rank=4, iters=1, **options)
    layers = [model.base_model.model.get_submodule(name).base_layer for name in ("first", "middle.1", "last")]
    found = [layer.grid.bits for layer in layers]
    counts = [layer.in_features * layer.out_features for layer in layers]
    assert sum(n * b for n, b in zip(counts, found, strict=True)) <= options["bits"] * sum(counts)
    if widths is None:
        assert len(set(found)) > 1
    else:
        assert found == widths


def test_transformers_models_too() -> None:
    tokens = torch.tensor([[1, 2, 3, 4]])
    wanted = pico_llama()(tokens).logits.float()
    names = ["*_proj"]
    rounded = loftq.quantize_model(pico_llama(), names, lora=False)(tokens).logits.float()
    model = loftq.quantize_model(pico_llama(), names, rank=8)
    assert (model(tokens).logits.float() - wanted).norm() < (rounded - wanted).norm()
    assert type(model.base_model.model.lm_head) is nn.Linear


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora": False, "quantize": False}, "nothing to do"),
        ({"rank": 33}, "'last'"),
        ({"bits": 9}, "--bits 9"),
        ({"bits": 5, "quant_type": "nf"}, "--bits 5"),
        ({"quant_type": "int", "group_size": 48}, "group size 48"),
        ({"quant_type": "int", "group_size": 128}, "'first'.*use --group-size 64"),
        ({"block_size": 4096 * 2}, "block size"),
        ({"target_modules": ["nowhere"]}, "first"),
        ({"alpha": 0}, "alpha"),
    ],
)
def test_bad_input(options: dict[str, object], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        loftq.quantize_model(Network(), **options)  # type: ignore[arg-type]


def test_bad_weights_and_no_linears() -> None:
    network = Network()
    network.first.weight.data[0, 0] = torch.nan
    with pytest.raises(OptionError, match="'first' holds NaN"):
        loftq.quantize_model(network)
    assert type(network.last) is nn.Linear
    with pytest.raises(OptionError, match=r"no nn\.Linear"):
        loftq.quantize_model(nn.Sequential(nn.ReLU()))
