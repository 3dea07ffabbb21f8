"""Oracle: the warning appears where the backbone runs alone or with a new LoRA, once, and nowhere else."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, pico_llama, save_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import loftq

TOKENS = torch.tensor([[11, 42, 7, 99, 3, 250, 17, 5]])
TEXT = {"calibration": "default", "calibration_tokens": 4096, "sequence_length": 64, "refine": 0}


@pytest.fixture(scope="module", params=["nf", "tcq"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    source = save_model(pico_llama(), root / "source")
    byte_tokenizer().save_pretrained(source)
    settings: dict[str, Any] = {"bits": 2, "quant_type": request.param, "rank": 4, "quiet": True, **TEXT}
    return loftq.quantize(str(source), output=root / "out", **settings).folder


def warned(model: Any) -> int:
    """How many warnings two forward passes give."""
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(2):
            model(TOKENS)
    return sum("of no use without" in str(each.message) for each in caught)


def test_the_backbone_alone_says_so_once(folder: Path) -> None:
    backbone = AutoModelForCausalLM.from_pretrained(folder)
    assert warned(backbone) == 1


def test_a_new_lora_says_so(folder: Path) -> None:
    backbone = AutoModelForCausalLM.from_pretrained(folder)
    assert warned(get_peft_model(backbone, LoraConfig(r=2, target_modules=["q_proj"]))) == 1


def test_the_pair_and_its_merge_say_nothing(folder: Path) -> None:
    model = loftq.load_qlora(folder)
    assert warned(model) == 0
    assert warned(model.merge_and_unload()) == 0
    fresh = loftq.load_qlora(folder)
    assert warned(fresh.merge_and_unload()) == 0
    together = AutoModelForCausalLM.from_pretrained(folder, adapter_kwargs={"subfolder": "loftq_init"})
    assert warned(together) == 0


def test_the_mark_survives_saving(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    for place in (folder, tmp_path):
        entry = json.loads((place / "config.json").read_text())["quantization_config"]
        assert entry["needs_adapter"] is True
    card = (folder / "README.md").read_text()
    assert "of no use" in card
    assert "--rounding intrinsic" in card
