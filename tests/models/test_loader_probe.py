"""Trials of loading and running on the meta device. Oracles: transformers' own load and forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZES, save_model
from picos import pico_model
from small_models import small_model
from transformers import AutoConfig, AutoModelForCausalLM

import loftq
from loftq.errors import SourceError
from loftq.formats.artifact import open_artifact
from loftq.models.linears import find_linears
from loftq.models.loader_probe import keeps_modules, runs_packed, unpackable

LLAMA4 = {"num_local_experts": 4, "intermediate_size_mlp": 64, "head_dim": 16, "pad_token_id": 0}
RWKV = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "context_length": 64, "intermediate_size": 128}


def model_of(model_type: str, **sizes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).bfloat16()


def test_experts_that_bitsandbytes_would_split_are_left_to_our_format(tmp_path: Path) -> None:
    model = model_of("llama4_text", **{**SIZES, **LLAMA4})
    assert not keeps_modules(model, "bitsandbytes")
    assert keeps_modules(model, "loftq")
    report = loftq.quantize(str(save_model(model, tmp_path / "s")), output=tmp_path / "o", rank=4, iters=1, quiet=True)
    assert open_artifact(report.folder).manifest["format"] == "loftq"
    loaded = loftq.load_qlora(report.folder, dtype=torch.float32).eval()
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        wanted, actual = model.float().eval()(ids).logits, loaded(ids).logits
    assert (actual - wanted).norm() < 0.3 * wanted.norm()


def test_a_model_whose_code_reads_its_weights_is_refused(tmp_path: Path) -> None:
    model = model_of("rwkv", **RWKV)
    assert not runs_packed(model.to("meta"), find_linears(model).candidates)
    source = save_model(model_of("rwkv", **RWKV), tmp_path / "s")
    with pytest.raises(SourceError, match="the code of rwkv in transformers uses the weights of its linears directly"):
        loftq.quantize(str(source), output=tmp_path / "o", rank=4, quiet=True)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("name", "task"), [("granite", "causal-lm"), ("t5", "seq2seq-lm"), ("mixtral", "causal-lm")])
def test_models_that_run_are_not_refused(name: str, task: str) -> None:
    model = pico_model(name, task).to("meta")
    assert keeps_modules(model, "bitsandbytes")
    assert runs_packed(model, find_linears(model).candidates)


@pytest.mark.parametrize(
    ("kind", "task", "ends", "why"),
    [
        ("wavlm", "ctc", {"q_proj", "k_proj", "v_proj", "out_proj"}, "directly"),  # torch's function of attention
        ("jamba", "causal-lm", {"dt_proj"}, "directly"),
        ("longt5", "seq2seq-lm", {"wo"}, "casts inputs"),
        ("whisper", "speech-seq2seq", set(), ""),
        ("beit", "image-classification", set(), ""),
    ],
)
def test_linears_that_the_code_needs_dense_are_found(kind: str, task: str, ends: set[str], why: str) -> None:
    """Oracle: the code of transformers."""
    model = small_model(kind, task).to("meta")
    found = unpackable(model, find_linears(model).candidates)
    assert {name.rpartition(".")[2] for name in found} == ends
    assert all(why in reason for reason in found.values())
    assert runs_packed(model, find_linears(model).candidates.keys() - found.keys())
    assert runs_packed(model, find_linears(model).candidates) == (why != "directly")
