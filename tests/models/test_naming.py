"""Names: which modules are found, which patterns reach them, which checkpoint tensor is which parameter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import SIZES, pico_llama, save_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations import replace_with_bnb_linear

import loftq
from loftq.errors import OptionError, SourceError
from loftq.models import naming

NAMES = [f"model.layers.{i}.{part}" for i in (0, 1, 11) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.gate")]


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
    assert len(naming.select(NAMES, targets, excluded)) == count


@pytest.mark.parametrize("pattern", ["proj", "layers.2.*", "k_proj", "MODEL.layers.0.mlp.gate"])
def test_select_says_what_there_is(pattern: str) -> None:
    with pytest.raises(OptionError, match="gate, q_proj, up_proj"):
        naming.select(NAMES, [pattern], ())


def test_select_nothing_left() -> None:
    with pytest.raises(OptionError, match="leaves no linear"):
        naming.select(NAMES, None, ["*"])


def test_meta_model_takes_no_memory_and_knows_its_head(pico: Path) -> None:
    model = naming.build_meta(pico)
    assert all(parameter.is_meta for parameter in model.parameters())
    linears = naming.find_linears(model)
    assert linears.heads == ("lm_head",)
    assert len(linears.candidates) == 14


def test_subclasses_of_linear_are_left(pico: Path) -> None:
    """Oracle: transformers converts `type(module) is nn.Linear` alone."""

    class OwnLinear(nn.Linear):
        pass

    model = naming.build_meta(pico)
    model.model.layers[0].mlp.up_proj = OwnLinear(64, 128, device="meta")  # type: ignore[union-attr, index]
    linears = naming.find_linears(model)
    assert linears.others == {"model.layers.0.mlp.up_proj": "OwnLinear"}
    assert "model.layers.0.mlp.up_proj" not in linears.candidates


@pytest.mark.parametrize("excluded", [[], ["down_proj"], ["layers.0.*"], ["layers.1.self_attn.q_proj", "up_proj"]])
def test_skip_modules_are_what_transformers_skips(pico: Path, excluded: list[str]) -> None:
    """Oracle: the modules that transformers itself replaces."""
    linears = naming.find_linears(naming.build_meta(pico))
    targets = naming.select(list(linears.candidates), None, excluded)
    replaced = replace_with_bnb_linear(
        naming.build_meta(pico),
        modules_to_not_convert=naming.skip_modules(linears, targets),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        pre_quantized=True,
    )
    found = {name for name, module in replaced.named_modules() if type(module).__name__ == "Linear4bit"}
    assert found == set(targets)


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
        loftq.quantize(str(tmp_path / name), output=tmp_path / f"{name}-out", rank=4, iters=1, quiet=True).folder
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


def test_transposed_layers_are_refused_for_now(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = save_model(GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=320)), tmp_path / "gpt2")
    with pytest.raises(SourceError, match="Conv1D"):
        loftq.quantize(str(source), output=tmp_path / "out", quiet=True)


def test_encoder_decoders_are_refused_for_now(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4, vocab_size=320)
    source = save_model(T5ForConditionalGeneration(config), tmp_path / "t5")
    with pytest.raises(SourceError, match=r"t5 model .*not a causal language model"):
        loftq.quantize(str(source), output=tmp_path / "out", quiet=True)
