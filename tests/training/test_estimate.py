"""What a training will need, over the families. Oracle: the shapes of what a backward pass cannot do without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from grids import thinned
from mixtures import save_mixture
from picos import CHANGES, dtype_of, save_pico
from rows import write_rows
from transformers import AutoConfig

from loftq.errors import OptionError
from loftq.formats.checkpoint import TensorSpec, index_text, lay_out
from loftq.models import expert_groups
from loftq.training import pace
from loftq.training.estimate import Estimate, estimate

_SEQ2SEQ = {"bart", "mbart", "pegasus", "marian", "t5", "t5/gated", "mt5"}
_ENCODERS = {"bert", "roberta", "xlm-roberta", "electra", "deberta", "deberta-v2", "deberta-v2/unshared"}
_ENCODERS |= {"distilbert", "albert", "camembert"}
_CAUSAL = set(CHANGES) - _SEQ2SEQ - _ENCODERS - {"vit"}
_NO_CLASSIFIER = {"pegasus", "marian", "olmoe", "granite", "codegen"}  # in transformers
_TASKS = {
    "sft": sorted(_CAUSAL),
    "summarization": sorted(_SEQ2SEQ),
    "classification": sorted({*CHANGES} - {"vit"} - _NO_CLASSIFIER),
}
_EACH_KIND = {"llama", "gpt2", "mixtral", "bert", "deberta", "albert", "bart", "t5"}
_WIDTH, _TOKENS = 64, 32
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


@pytest.fixture(autouse=True)
def _no_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_SECONDS", 0.0)


def _save(name: str, folder: Path, **changes: Any) -> Path:
    kind = "seq2seq-lm" if name in _SEQ2SEQ else "masked-lm" if name in _ENCODERS else "causal-lm"
    return save_pico(name, kind, folder / "model", **changes)


_LONG = "It rained all day and all night. " * 3
_ROWS: dict[str, dict[str, Any]] = {
    "sft": {"prompt": "Rain?", "response": _LONG},
    "summarization": {"document": _LONG, "summary": _LONG},
    "classification": {"text": _LONG, "label": 1},
}


def _estimate(folder: Path, task: str, **options: Any) -> Estimate:
    data = write_rows(folder.parent / f"{task}.jsonl", [_ROWS[task]] * 9)
    fixed = {"rank": 4, "data": str(data), "output": "unwritten", "cutoff_len": _TOKENS, "dtype": "bfloat16"}
    return estimate(str(folder), task=task, **{**fixed, **options})


@pytest.mark.parametrize(
    ("task", "name"),
    thinned(
        ((task, name) for task, names in _TASKS.items() for name in names),
        lambda _, name: name in _EACH_KIND,
    ),
)
def test_every_family_is_measured(task: str, name: str, tmp_path: Path) -> None:
    folder = _save(name, tmp_path)
    one, four, thrifty = (
        _estimate(folder, task, batch_size=rows, gradient_checkpointing=thrift, dtype=str(dtype_of(name))[6:])
        for rows, thrift in ((1, False), (4, False), (4, True))
    )
    layers = 4 if name in _SEQ2SEQ else 2
    assert thrifty.activations >= layers * 4 * _TOKENS * _WIDTH * 2  # what enters each block, in bfloat16
    assert four.activations > one.activations
    if name != "albert":  # whose two layers are one block
        assert thrifty.activations < four.activations
    assert thrifty.weights == one.weights > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_a_classifier_needs_no_padding_token(name: str, tmp_path: Path) -> None:
    without = _estimate(_save(name, tmp_path / "a", pad_token_id=None), "classification")
    assert without.memory == _estimate(_save(name, tmp_path / "b", pad_token_id=0), "classification").memory


def test_a_model_that_does_not_run_says_what_to_try(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"DebertaFor.* does not run in torch\.bfloat16 .* try another --dtype"):
        _estimate(_save("deberta", tmp_path), "classification")


def test_offloaded_experts_are_counted_in_main_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: two layers of four experts, 3 x 64 x 64 weights each, in 4 bits with a float16 scale for each 64."""
    folder = save_mixture("qwen3_moe", tmp_path / "model", moe_intermediate_size=64)
    options = {"gradient_checkpointing": True, "batch_size": 1}
    expert = 3 * 64 * 64
    packed = expert // 2 + expert // 64 * 2
    held = _estimate(folder, "sft", **options)
    assert (held.experts, held.offloaded) == (4 * expert * 2, 0)
    for weights, unpacked, buffers in ((expert, 1, 2), (2 * expert, 2, 4), (1 << 24, 4, 4)):
        monkeypatch.setattr(expert_groups, "WEIGHTS_ON_CPU", weights)
        moved = _estimate(folder, "sft", offload="experts", **options)
        assert moved.offloaded == 2 * 4 * packed
        assert moved.experts == unpacked * expert * 2 + buffers * packed
        assert moved.weights == held.weights - moved.offloaded
        assert (moved.adapter, moved.activations) == (held.adapter, held.activations)
        assert moved.memory == moved.weights + moved.adapter + moved.activations + moved.experts


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4])
def test_qwen3_30b_a3b_fits_a_card_of_12_gb(bits: int, tmp_path: Path) -> None:
    """Oracle: the formulas of the shapes of its weights. Only the headers of its checkpoint exist, without bytes."""
    layers, width, inner, experts, vocabulary = 48, 2048, 768, 128, 151936
    config = AutoConfig.for_model(
        "qwen3_moe",
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=6144,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=experts,
        num_experts_per_tok=8,
        moe_intermediate_size=inner,
        max_position_embeddings=40960,
    )
    folder = tmp_path / "model"
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    attention = {"q_proj": (4096, width), "k_proj": (512, width), "v_proj": (512, width), "o_proj": (width, 4096)}
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("model.embed_tokens", "lm_head"), (vocabulary, width))
    shapes["model.norm"] = (width,)
    for layer in (f"model.layers.{i}" for i in range(layers)):
        shapes |= {f"{layer}.self_attn.{name}": shape for name, shape in attention.items()}
        shapes |= {f"{layer}.self_attn.{name}": (128,) for name in ("q_norm", "k_norm")}
        shapes |= {f"{layer}.{name}": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes[f"{layer}.mlp.gate"] = (experts, width)
        for expert in (f"{layer}.mlp.experts.{i}" for i in range(experts)):
            shapes |= {f"{expert}.{name}": (inner, width) for name in ("gate_proj", "up_proj")}
            shapes[f"{expert}.down_proj"] = (width, inner)
    specs = [[TensorSpec(f"{name}.weight", torch.bfloat16, shape)] for name, shape in shapes.items()]
    shards = lay_out(specs, 4 * 10**9)
    for shard in shards:
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
    (folder / "model.safetensors.index.json").write_text(index_text(shards))

    def packed(weights: int) -> int:
        return weights * bits // 8 + weights // 64 * 2

    data = write_rows(tmp_path / "long.jsonl", [{"prompt": "Rain?", "response": 20 * _LONG}] * 9)
    options = {"bits": bits, "rank": 16, "cutoff_len": 1024, "batch_size": 1, "optim": "paged_adamw_8bit"}
    needed = _estimate(folder, "sft", data=str(data), offload="experts", gradient_checkpointing=True, **options)
    assert needed.batch == (1, 1024)
    assert needed.offloaded == layers * packed(experts * 3 * width * inner)
    rest = layers * (experts * width + 2 * width + 2 * 128) + width + 2 * vocabulary * width
    headers = needed.weights - layers * sum(packed(a * b) for a, b in attention.values()) - 2 * rest
    assert 0 < headers < 1e6  # of the files
    factors = layers * (16 * sum(map(sum, attention.values())) + 4 * experts * (width + 2 * inner + inner + width))
    assert needed.trainable == factors
    assert needed.adapter == 10 * factors
    assert needed.memory < 12e9
