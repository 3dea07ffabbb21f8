"""What docs/other-tools.md tells of peft and torch.compile: nothing here is code of ours, and may change.

Oracle: the logits of the backbone, and of the backbone with its initial adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoftQConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import loftq

TOKENS = torch.tensor([[11, 42, 7, 99, 3, 250, 17, 5, 64, 128]])
NEW = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])  # B is 0: it adds nothing yet


@pytest.fixture(scope="module")
def folder(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("several") / "out"
    return loftq.quantize(str(pico), output=output, rank=16, iters=2, quiet=True).folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits.float()


def test_a_second_adapter_runs_on_the_backbone_unless_it_is_stacked(folder: Path) -> None:
    model = loftq.load_qlora(folder)
    start = logits(model)
    with model.disable_adapter():
        backbone = logits(model)
    assert not torch.equal(backbone, start)
    model.add_adapter("new", NEW)
    model.set_adapter("new")
    assert torch.equal(logits(model), backbone)
    model.base_model.set_adapter(["default", "new"])
    assert torch.equal(logits(model), start)
    assert any("new" in name for name, p in model.named_parameters() if p.requires_grad)
    assert torch.equal(logits(model.unload()), backbone)


def test_pefts_own_loftq_refuses_a_cpu(pico: Path) -> None:
    if torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available()):
        pytest.skip("peft takes this GPU")
    model = AutoModelForCausalLM.from_pretrained(pico)
    config = LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4), target_modules=["q_proj"])
    with pytest.raises((AssertionError, RuntimeError, ValueError), match=r"CUDA|GPU"):
        get_peft_model(model, config)


@pytest.mark.slow
def test_inference_compiles_to_one_graph(folder: Path) -> None:
    model = loftq.load_qlora(folder, is_trainable=False)
    expected = logits(model)
    with torch.no_grad():
        found = torch.compile(model.eval(), fullgraph=True, backend="eager")(input_ids=TOKENS, use_cache=False).logits
    assert torch.equal(found.float(), expected)
