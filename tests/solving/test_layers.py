"""Layers of extreme values in whole runs, and how often headers are parsed. The oracle of errors is `verify`."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZES, pico_llama, save_model
from torch import nn

import loftq
from loftq.core.solvers.solution import Solution
from loftq.errors import OptionError
from loftq.formats import tensor_files
from loftq.solving import layers

QUIET: dict[str, Any] = {"rank": 4, "iters": 1, "workers": 1, "quiet": True}


def strict(path: Path) -> Any:
    """The contents of a JSON file, without the NaN and Infinity that Python's reader would accept."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path} holds {name}")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def extreme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers are as extreme as float32 allows."""
    model = pico_llama()
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        with torch.no_grad():
            attention.q_proj.weight *= 1e30 if i else 1e-30
            attention.k_proj.weight.copy_(attention.k_proj.weight[:, :1].expand_as(attention.k_proj.weight))
            attention.v_proj.weight.zero_()
            attention.o_proj.weight[0, 0] = 1e30
            layer.mlp.up_proj.weight.copy_(torch.outer(torch.randn(SIZES["intermediate_size"]), torch.randn(64)))
    return save_model(model, tmp_path_factory.mktemp("extreme") / "model")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 2, "rank": 32},
        {"bits": 2, "quant_type": "int", "group_size": 64, "zero_point": "integer", "rank": 32},
        {"bits": 8},
        {"adapter": "qalora", "group_size": 32, "rank": 2},
        {"double_quant": True, "iters": 0},
    ],
    ids=["NF4", "NF2 at full rank", "INT2 at full rank", "INT8", "QA-LoRA", "QLoRA"],
)
def test_extreme_layers_give_a_sound_folder(options: dict[str, Any], extreme: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    loftq.quantize(str(extreme), output=str(output), **{**QUIET, "compute_dtype": "float32", **options})
    for row in strict(output / "loftq.json")["layers"]:
        assert 0 <= row["error"] < 2
        if "v_proj" in row["name"]:
            assert row["error"] == 0
    assert loftq.verify(output, source=str(extreme), quiet=True).problems == ()


def test_a_small_error_at_full_rank_is_the_true_one(pico: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    loftq.quantize(str(pico), output=str(output), **{**QUIET, "bits": 2, "rank": 32})
    errors = {row["name"]: row["error"] for row in strict(output / "loftq.json")["layers"]}
    full = [error for name, error in errors.items() if "k_proj" in name or "v_proj" in name]  # 32 outputs
    assert full
    assert max(full) < 1e-6
    assert loftq.verify(output, source=str(pico), quiet=True).sound


def test_a_layer_that_is_not_finite_is_named_and_not_noted(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = layers.solve_by

    def broken(*arguments: Any) -> Solution:
        solution = solve(*arguments)
        return replace(solution, a=solution.a * math.nan) if arguments[1].shape[0] == 128 else solution

    monkeypatch.setattr(layers, "solve_by", broken)
    output = tmp_path / "out"
    with pytest.raises(OptionError, match=r"layers\.\d\.mlp\.\w+_proj cannot be quantized .*--exclude-modules"):
        loftq.quantize(str(pico), output=str(output), **QUIET)
    journal = (output / ".loftq-partial" / "journal.jsonl").read_text()
    assert "NaN" not in journal
    assert "gate_proj" not in journal.partition("\n")[2]


def test_a_weight_beyond_the_compute_dtype_is_named(tmp_path: Path) -> None:
    model = pico_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 1e6
    source = save_model(model, tmp_path / "model")
    with pytest.raises(OptionError, match=r"layers\.1\.mlp\.down_proj\.weight' holds 9\.99e\+05, .*use bfloat16"):
        loftq.quantize(str(source), output=str(tmp_path / "out"), compute_dtype="float16", **QUIET)


@pytest.mark.parametrize("value", [1e30, 1e-30])
@pytest.mark.parametrize("options", [{}, {"bits": 2, "quant_type": "int", "group_size": 64, "zero_point": "integer"}])
def test_a_model_in_memory_gets_finite_factors(value: float, options: dict[str, Any]) -> None:
    for weight in (torch.randn(128, 64) * value, torch.randn(128, 1).expand(128, 64) * value):
        model = nn.Sequential(nn.Linear(64, 128, bias=False))
        model[0].weight.data = weight.clone()
        adapted: Any = loftq.quantize_model(model, rank=64, iters=1, **options)
        layer = adapted.base_model.model[0]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert torch.isfinite(a).all()
        assert torch.isfinite(b).all()


def test_headers_are_parsed_once_a_verb_whatever_the_number_of_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time that grows with the square of the number of tensors came from here: each tensor parsed its header again."""
    counts: Counter[str] = Counter()
    parse = tensor_files._read_header

    def counting(descriptor: int, path: Path) -> Any:
        counts["headers"] += 1
        return parse(descriptor, path)

    monkeypatch.setattr(tensor_files, "_read_header", counting)
    seen = []
    for depth in (1, 4):
        source = save_model(pico_llama(num_hidden_layers=depth), tmp_path / f"model{depth}")
        output, merged = tmp_path / f"out{depth}", tmp_path / f"merged{depth}"
        counts.clear()
        loftq.quantize(str(source), output=str(output), **QUIET)
        seen.append(counts.pop("headers"))
        loftq.verify(output, source=str(source), quiet=True)
        seen.append(counts.pop("headers"))
        loftq.merge(output, to="bf16", output=merged, check=False, quiet=True)
        seen.append(counts.pop("headers"))
        loftq.inspect(output)
        seen.append(counts.pop("headers"))
    assert seen[:4] == seen[4:]
    assert max(seen) <= 6
