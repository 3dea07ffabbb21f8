"""Names: which checkpoint tensor is which parameter."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import SIZES, pico_llama, save_model
from picos import save_pico
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaModel,
)

import loftq


def test_checkpoint_of_the_base_model(tmp_path: Path) -> None:
    """A checkpoint without the `model.` prefix, its head tied: the same bytes as with the prefix."""
    torch.manual_seed(0)
    whole = pico_llama(tie_word_embeddings=True)
    save_model(whole, tmp_path / "whole")
    base = LlamaModel(LlamaConfig(**SIZES, tie_word_embeddings=True)).bfloat16()
    base.load_state_dict(whole.model.state_dict())
    save_model(base, tmp_path / "base")
    assert "layers.0.mlp.up_proj.weight" in load_file(tmp_path / "base" / "model.safetensors")
    folders = [
        loftq.quantize(
            str(tmp_path / name), task="causal-lm", output=tmp_path / f"{name}-out", rank=4, iters=1, quiet=True
        ).folder
        for name in ("whole", "base")
    ]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = save_model(pico_llama(tie_word_embeddings=True), tmp_path / "tied")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = loftq.quantize(str(source), output=tmp_path / "out", rank=4, iters=1, quiet=True)
    assert "lm_head.weight" not in load_file(report.folder / "model.safetensors")
    assert any("lm_head.weight" in note for note in report.notes)
    model = AutoModelForCausalLM.from_pretrained(report.folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tensors_that_the_model_has_no_use_for_are_said(pico: Path, tmp_path: Path) -> None:
    from shutil import copytree

    from safetensors.torch import save_file

    source = copytree(pico, tmp_path / "old")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = loftq.quantize(str(source), output=tmp_path / "out", rank=4, iters=1, quiet=True)
    assert any("inv_freq" in note for note in report.notes)
    assert not any("inv_freq" in name for name in load_file(report.folder / "model.safetensors"))


def test_old_names_of_norms(tmp_path: Path) -> None:
    """Checkpoints of the first BERT call a norm's weight gamma and its bias beta: the same bytes as today's names."""
    from safetensors.torch import save_file

    today = save_pico("bert", "masked-lm", tmp_path / "today")
    old = save_pico("bert", "masked-lm", tmp_path / "old")
    tensors = load_file(old / "model.safetensors")
    for now, then in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        tensors = {name.replace(now, then): tensor for name, tensor in tensors.items()}
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    folders = [
        loftq.quantize(str(source), output=tmp_path / f"{source.name}-out", rank=4, iters=1, quiet=True).folder
        for source in (today, old)
    ]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1
