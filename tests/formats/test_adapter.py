"""The adapter folder against a stock peft: what it reads from the config, loads from the weights, and attaches to.

Covers: loftq/formats/adapter_targets.py.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pico_llama
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn

from loftq.errors import OptionError
from loftq.formats import adapter
from loftq.formats.adapter_targets import target_names
from loftq.formats.checkpoint import lay_out
from loftq.formats.shard_writer import ShardWriter

OPTIONS = [
    {"rank": 4, "alpha": 4.0, "rslora": False, "dropout": 0.0},
    {"rank": 8, "alpha": 16.0, "rslora": False, "dropout": 0.05},
    {"rank": 6, "alpha": 2.5, "rslora": False, "dropout": 0.0},
    {"rank": 8, "alpha": 16.0, "rslora": True, "dropout": 0.0},
    {"rank": 3, "alpha": 0.75, "rslora": True, "dropout": 0.5},
]


def write_config(folder: Path, targets: list[str], **options: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = adapter.config_text("some/backbone", targets, task_type="CAUSAL_LM", **options)
    (folder / adapter.CONFIG).write_text(text)


def attached(model: nn.Module, targets: list[str]) -> set[str]:
    """The modules of a copy of the model to which peft attaches an adapter."""
    adapted = get_peft_model(deepcopy(model), LoraConfig(r=2, target_modules=targets))
    return set(adapted.base_model.targeted_module_names)


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()]


@pytest.mark.parametrize("options", OPTIONS)
def test_config_is_read_as_what_was_asked_for(options: dict[str, Any], tmp_path: Path) -> None:
    write_config(tmp_path, ["q_proj", "v_proj"], **options)
    expected = LoraConfig(
        r=options["rank"],
        lora_alpha=options["alpha"],
        use_rslora=options["rslora"],
        lora_dropout=options["dropout"],
        target_modules=["q_proj", "v_proj"],
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path="some/backbone",
        inference_mode=True,
    )
    read = LoraConfig.from_pretrained(tmp_path)  # an unknown field would be a warning, which fails a test
    assert read.to_dict() == expected.to_dict()


def test_config_survives_being_saved_by_peft(tmp_path: Path) -> None:
    write_config(tmp_path / "ours", ["q_proj"], **OPTIONS[1])
    read = LoraConfig.from_pretrained(tmp_path / "ours")
    read.save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / name / adapter.CONFIG).read_text()) for name in ("ours", "theirs"))
    assert ours == {name: theirs[name] for name in ours}
    assert LoraConfig.from_pretrained(tmp_path / "theirs").to_dict() == read.to_dict()


@pytest.mark.parametrize("options", OPTIONS)
def test_stock_peft_loads_the_folder_with_our_scaling(options: dict[str, Any], tmp_path: Path) -> None:
    model = pico_llama().float()
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in linears(model) if name != "lm_head"}
    specs = [spec for name, shape in shapes.items() for spec in adapter.specs(name, shape, options["rank"])]
    factors = {spec.name: torch.randn(spec.shape, dtype=spec.dtype) for spec in specs}
    write_config(tmp_path, target_names(shapes, names_of(model)), **options)
    with ShardWriter(tmp_path, lay_out([specs], 10**9, adapter.WEIGHTS)) as writer:
        for name, factor in factors.items():
            writer.write(name, factor)

    loaded = PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    for name in shapes:
        layer = loaded.get_submodule(f"base_model.model.{name}")
        a, b = (factors[key] for key in adapter.keys(name))
        assert torch.equal(layer.lora_A["default"].weight, a)
        assert torch.equal(layer.lora_B["default"].weight, b)
        factor = adapter.scaling(options["alpha"], options["rank"], options["rslora"])
        assert layer.scaling["default"] == factor
        torch.testing.assert_close(layer.get_delta_weight("default"), factor * (b @ a))
        assert getattr(layer.lora_dropout["default"], "p", 0.0) == options["dropout"]
    assert len(factors) == sum(".lora_" in name for name, _ in loaded.named_parameters())


def test_targets_are_last_components_where_they_reach_nothing_else() -> None:
    model = pico_llama()
    targets = [name for name in linears(model) if name != "lm_head"]
    names = target_names(targets, names_of(model))
    assert names == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert attached(model, names) == set(targets)


@pytest.mark.parametrize("layers", [2, 6])  # from 20 names on, peft shortens a list on its own
def test_targets_are_full_names_where_some_are_left_out(layers: int) -> None:
    model = pico_llama(num_hidden_layers=layers)
    left_out = {"lm_head", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"}
    targets = [name for name in linears(model) if name not in left_out]
    names = target_names(targets, names_of(model))
    assert names == sorted(targets)
    assert attached(model, names) == set(targets)


def test_left_out_layers_with_a_name_of_their_own_need_no_full_names() -> None:
    model = pico_llama()
    targets = [name for name in linears(model) if name.endswith(("q_proj", "v_proj"))]
    names = target_names(targets, names_of(model))
    assert names == ["q_proj", "v_proj"]
    assert attached(model, names) == set(targets)


def towers() -> nn.Module:
    """Two towers with the same names in them; in one, a table is called like the other's linear."""
    model = nn.Module()
    model.text, model.vision = nn.Module(), nn.Module()
    model.text.q_proj, model.vision.q_proj = nn.Linear(4, 4), nn.Linear(4, 4)
    model.text.proj, model.vision.proj = nn.Linear(4, 4), nn.Embedding(4, 4)
    return model


@pytest.mark.parametrize("last", ["q_proj", "proj"])
def test_a_module_that_only_shares_its_last_component_is_not_reached(last: str) -> None:
    targets = [f"text.{last}"]
    assert attached(towers(), [last]) == {f"text.{last}", f"vision.{last}"}  # the trap
    names = target_names(targets, names_of(towers()))
    assert attached(towers(), names) == set(targets)


def test_targets_that_peft_cannot_tell_apart_are_refused() -> None:
    model = towers()
    model.vision.text = nn.Module()
    model.vision.text.q_proj = nn.Linear(4, 4)
    assert attached(model, ["text.q_proj"]) == {"text.q_proj", "vision.text.q_proj"}
    with pytest.raises(OptionError, match=r"without 'vision\.text\.q_proj', .* target both or neither"):
        target_names(["text.q_proj"], names_of(model))
    both = ["text.q_proj", "vision.text.q_proj"]
    assert attached(model, target_names(both, names_of(model))) == set(both)
