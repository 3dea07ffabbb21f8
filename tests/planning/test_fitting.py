"""Linears that stay in 16 bits because they do not fit. Oracle: the files of the artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pico_llama, save_model
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import loftq
from loftq.errors import OptionError
from loftq.models.linears import DenseLinear
from loftq.planning.fitting import Fitting
from loftq.planning.recipe import recipe_of


def fitting(settings: dict[str, Any], **shapes: tuple[int, int]) -> Fitting:
    """Linears of these shapes in a model without a configuration, about which peft has nothing to say."""
    targets = {f"block.{name}": DenseLinear(shape) for name, shape in shapes.items()}
    return Fitting(nn.Module(), targets, recipe_of(**settings, format="loftq"))


@pytest.mark.parametrize(
    ("settings", "odd", "reason"),
    [
        ({"rank": 8}, (4, 4), "they are smaller than --rank 8"),
        ({"rank": 4}, (144, 132), "they do not fit block size 64"),
        ({"rank": 4, "quant_type": "int", "group_size": 32}, (4304, 40), "they do not fit group size 32"),
        ({"rank": 2, "adapter": "qalora", "group_size": 32}, (64, 40), "--pool-size 32 does not divide their inputs"),
        ({"rank": 4, "adapter": "qalora", "group_size": 32}, (64, 64), "they are smaller than --rank 4"),
    ],
)
def test_an_odd_linear_stays(settings: dict[str, Any], odd: tuple[int, int], reason: str) -> None:
    plan = fitting(settings, odd=odd, usual=(4096, 256))
    assert list(plan.targets) == ["block.usual"]
    assert plan.reasons == {"block.odd": reason}
    assert list(plan.notes("float16")) == [f"linears that stay in float16, because {reason}: block.odd"]


def test_settings_that_fit_hardly_any_weight_are_refused() -> None:
    with pytest.raises(OptionError, match=r"--rank 65 is larger than the smaller side of block.large \(64 x 128\)"):
        fitting({"rank": 65}, large=(64, 128), small=(66, 66))
    with pytest.raises(OptionError, match=r"--block-size 64 does not divide its 72 inputs"):
        fitting({"rank": 4}, large=(64, 72))


def test_small_linears_keep_their_values_and_the_rest_loads(tmp_path: Path) -> None:
    model = pico_llama(num_key_value_heads=1)  # k_proj and v_proj: 16 x 64
    source = save_model(model, tmp_path / "source")
    report = loftq.quantize(str(source), output=tmp_path / "out", rank=32, iters=1, quiet=True)
    names = {row["name"] for row in report.layers}
    assert len(names) == 10
    tensors, before = load_file(report.folder / "model.safetensors"), load_file(source / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in names:
            assert torch.equal(tensors[f"{name}.weight"], before[f"{name}.weight"]), name
    base = AutoModelForCausalLM.from_pretrained(report.folder, dtype=torch.bfloat16)
    PeftModel.from_pretrained(base, report.folder, subfolder="loftq_init")
