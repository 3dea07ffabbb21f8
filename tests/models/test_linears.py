"""Linears: which are found, which patterns reach them, which stock transformers converts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from picos import pico_config
from small_configs import small_config
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations import replace_with_bnb_linear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

from loftq.errors import OptionError
from loftq.models.families import family_of
from loftq.models.linears import (
    DenseLinear,
    Linears,
    bears_other_linears,
    computes_as_linear,
    find_linears,
    select,
    skip_modules,
)
from loftq.models.tasks import TASKS, auto_class, build_meta

PLAIN = nn.Module()
NAMES = [f"model.layers.{i}.{part}" for i in (0, 1, 11) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.gate")]
LINEARS = Linears({name: DenseLinear((64, 64)) for name in NAMES})


@pytest.mark.parametrize(
    ("targets", "excluded", "count"),
    [
        (None, (), 9),
        (["q_proj"], (), 3),
        (["self_attn.q_proj", "up_proj"], (), 6),
        (["*_proj"], (), 6),
        (["layers.1.*"], (), 3),
        (["model.layers.0.mlp.up_proj"], (), 1),
        (None, ["up_proj", "layers.0.*"], 4),
        (["mlp.*"], ["gate"], 3),
    ],
)
def test_select(targets: list[str] | None, excluded: list[str], count: int) -> None:
    assert len(select(PLAIN, LINEARS, targets, excluded)) == count


@pytest.mark.parametrize("pattern", ["proj", "layers.2.*", "k_proj", "MODEL.layers.0.mlp.gate"])
def test_select_says_what_there_is(pattern: str) -> None:
    with pytest.raises(OptionError, match="gate, q_proj, up_proj"):
        select(PLAIN, LINEARS, [pattern], ())


def test_select_nothing_left() -> None:
    with pytest.raises(OptionError, match="leaves no linear"):
        select(PLAIN, LINEARS, None, ["*"])


def test_meta_model_takes_no_memory_and_knows_its_head(pico: Path) -> None:
    model = build_meta(pico)[0]
    assert all(parameter.is_meta for parameter in model.parameters())
    linears = find_linears(model)
    assert linears.heads == ("lm_head",)
    assert len(linears.candidates) == 14


class SameLinear(nn.Linear):
    """Computes what `nn.Linear` does, by code of its own, as Falcon's does."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        product = hidden @ self.weight.T
        return product if self.bias is None else product + self.bias


class OtherLinear(nn.Linear):
    """Computes something else, as a router does."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden).softmax(-1)


class WideLinear(nn.Linear):
    """Wants what no linear wants."""

    def __init__(self, width: int, device: str) -> None:
        super().__init__(width, width, device=device)

    def forward(self, hidden: torch.Tensor, _more: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden)


def test_subclasses_of_linear_are_known_by_what_they_compute(pico: Path) -> None:
    """Oracle: transformers converts `type(module) is nn.Linear` alone; the classes are written for the test."""
    model = build_meta(pico)[0]
    for i, layer in enumerate([SameLinear(64, 128, device="meta"), OtherLinear(64, 128, device="meta")]):
        model.model.layers[i].mlp.up_proj = layer  # type: ignore[union-attr, index]
    model.model.layers[0].mlp.down_proj = WideLinear(64, "meta")  # type: ignore[union-attr, index]
    linears = find_linears(model)
    assert not linears.candidates["model.layers.0.mlp.up_proj"].stock
    assert linears.others == {
        "model.layers.1.mlp.up_proj": "OtherLinear",
        "model.layers.0.mlp.down_proj": "WideLinear",
    }
    assert computes_as_linear(FalconLinear)
    assert not computes_as_linear(PhimoeTopKRouter)


def test_projections_that_torch_multiplies_with_past_the_module_are_left() -> None:
    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4)
            self.mlp = nn.Linear(64, 64)

    linears = find_linears(Vision())
    assert list(linears.candidates) == ["mlp"]
    assert list(linears.others) == ["attention.out_proj"]


@pytest.mark.parametrize("excluded", [[], ["down_proj"], ["layers.0.*"], ["layers.1.self_attn.q_proj", "up_proj"]])
def test_skip_modules_are_what_transformers_skips(pico: Path, excluded: list[str]) -> None:
    """Oracle: the modules that transformers itself replaces."""
    model = build_meta(pico)[0]
    linears = find_linears(model)
    targets = select(model, linears, None, excluded)
    replaced = replace_with_bnb_linear(
        build_meta(pico)[0],
        modules_to_not_convert=skip_modules(model, linears, targets),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        pre_quantized=True,
    )
    found = {name for name, module in replaced.named_modules() if type(module).__name__ == "Linear4bit"}
    assert found == set(targets)


def test_targets_that_are_no_linears_are_named(pico: Path) -> None:
    model = build_meta(pico)[0]
    linears = find_linears(model)
    for pattern, said in [
        ("embed_tokens", "'model.embed_tokens', of class Embedding: only linear layers"),
        ("input_layernorm", "of class LlamaRMSNorm: only linear layers .*q_proj"),
        ("lm_head", "'lm_head', which stays in 16 bits"),
    ]:
        with pytest.raises(OptionError, match=said):
            select(model, linears, [pattern], ())


def test_what_stays_anyway_may_be_excluded(pico: Path) -> None:
    model = build_meta(pico)[0]
    assert len(select(model, find_linears(model), None, ["lm_head", "model.norm"])) == 14
    with pytest.raises(OptionError, match="matches no linear layer"):
        select(model, find_linears(model), None, ["lm_tail"])


def test_convolutions_are_named(tmp_path: Path) -> None:
    pico_config("vit", architectures=["ViTModel"]).save_pretrained(tmp_path)
    model = build_meta(tmp_path)[0]
    with pytest.raises(OptionError, match="of class Conv2d: only linear layers"):
        select(model, find_linears(model), ["projection"], ())


def test_a_shared_linear_cannot_be_adapted_twice() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
            self.second.weight = self.first.weight

    model = Shared()
    linears = find_linears(model)
    assert list(linears.candidates) == ["third"]
    assert linears.shared == {"first": "second", "second": "first"}
    for targets in (["first"], ["*"]):
        with pytest.raises(OptionError, match="shares its weight with"):
            select(model, linears, targets, ())


@pytest.mark.parametrize(("name", "borne"), [("llama", True), ("bert", True), ("t5", False), ("gpt2", False)])
def test_which_models_bear_linears_without_a_weight(name: str, borne: bool) -> None:
    """Oracle: loading each with gptqmodel 7.6, which fails where transformers begins weights by name."""
    with torch.device("meta"):
        model = auto_class(TASKS[family_of(name).tasks[0]]).from_config(pico_config(name))
    targets = list(find_linears(model).candidates)
    assert bears_other_linears(model, targets) == borne
    assert list(find_linears(model).candidates) == targets  # tried on a copy


@pytest.mark.parametrize(
    ("kind", "task", "head"),
    [("siglip", "image-classification", "classifier"), ("t5", "question-answering", "qa_outputs")],
)
def test_a_head_beside_the_parts_of_a_base_model_is_one(kind: str, task: str, head: str) -> None:
    """In these models no module is the base model."""
    with torch.device("meta"):
        model = auto_class(TASKS[task]).from_config(small_config(kind))
    found = find_linears(model)
    assert head in found.heads
    assert head not in found.candidates
