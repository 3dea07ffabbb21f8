"""What a GGUF file says of a model and its tokenizer, and what is refused.

Covers: loftq/formats/gguf_tokenizer.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from affines import random_affine
from pico_tokenizers import TEMPLATE, byte_level, sentence_piece
from picos import pico_config
from tokenizers import Tokenizer, models
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loftq.core.affine import AffineWeight
from loftq.errors import OptionError
from loftq.formats import gguf_q4_1
from loftq.formats.checkpoint import TensorSpec
from loftq.formats.gguf_metadata import rope_factors, rotary_order
from loftq.formats.gguf_tokenizer import SPLITS

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_of(kind: str, **changes: Any) -> dict[str, Any]:
    return pico_config(kind, vocab_size=400, head_dim=16).to_dict() | changes


def never(_: str) -> Any:
    raise AssertionError("a tensor was read")


def fields(folder: Path, config: dict[str, Any], dense: tuple[TensorSpec, ...] = ()) -> dict[str, Any]:
    """What the file of a model without linears says."""
    by_name = {spec.name: spec for spec in dense}
    gguf_q4_1.write(
        folder / "m.gguf", config, folder, {}, by_name, never, lambda name: torch.zeros(by_name[name].shape)
    )
    reader = gguf.GGUFReader(folder / "m.gguf")
    return {name: field.contents() for name, field in reader.fields.items()}


def lay_out(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> None:
    """Plan a model of one dense matrix."""
    spec = TensorSpec(name, dtype, (64, 64))
    gguf_q4_1.write(folder / "m.gguf", config_of("llama", **changes), folder, {}, {name: spec}, never, never)


def test_hyperparameters(tmp_path: Path) -> None:
    byte_level("qwen2").save_pretrained(tmp_path)
    found = fields(tmp_path, config_of("qwen3", head_dim=32))
    assert found["general.architecture"] == "qwen3"
    assert found["general.name"] == tmp_path.name
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_1
    own = {name.removeprefix("qwen3."): value for name, value in found.items() if name.startswith("qwen3.")}
    assert own == {
        "vocab_size": 400,
        "context_length": 128,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "rope.dimension_count": 32,
        "rope.freq_base": 10000.0,
    }


@pytest.mark.parametrize(
    ("changes", "stated"),
    [
        ({"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": None}, {"rope.freq_base": 5e5}),
        ({"rope_parameters": None, "rope_theta": None}, {"rope.freq_base": 1e4}),
        (
            {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 128},
        ),
        ({"head_dim": None, "num_key_value_heads": None}, {"attention.head_count_kv": 4, "rope.dimension_count": 16}),
        ({"sliding_window": 32}, {"context_length": 32}),
        ({"sliding_window": 32, "use_sliding_window": False}, {"context_length": 128}),
    ],
)
def test_configs_old_and_new(changes: dict[str, Any], stated: dict[str, Any], tmp_path: Path) -> None:
    sentence_piece().save_pretrained(tmp_path)
    found = fields(tmp_path, config_of("mistral", **changes))
    assert found["general.architecture"] == "llama"
    assert {key: found[f"llama.{key}"] for key in stated} == stated


def test_a_name_that_misleads_transformers_is_spelled_otherwise(tmp_path: Path) -> None:
    sentence_piece().save_pretrained(tmp_path / "mistral")
    assert fields(tmp_path / "mistral", config_of("mistral"))["general.name"] == "Mistral"


def test_llama3_frequencies_are_divided_as_transformers_does(tmp_path: Path) -> None:
    """Oracle: transformers' own frequencies."""
    config = pico_config("llama", head_dim=64, rope_parameters=LLAMA3)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-torch.arange(0, 64, 2) / 64)
    factors = torch.tensor(rope_factors(config.to_dict()))
    torch.testing.assert_close(plain / factors, scaled, rtol=1e-6, atol=0)
    assert len(set(factors.tolist())) > 3

    byte_level("llama-bpe").save_pretrained(tmp_path)
    fields(tmp_path, config_of("llama", head_dim=64, rope_parameters=LLAMA3))
    (tensor,) = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    assert (tensor.name, tensor.data.tolist()) == ("rope_freqs.weight", factors.tolist())


def test_rows_of_a_rotary_pair_become_neighbours() -> None:
    config = config_of("llama", num_attention_heads=2, num_key_value_heads=1)
    query = rotary_order("blk.0.attn_q.weight", 12, config)
    assert query is not None
    assert query.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    key = rotary_order("blk.0.attn_k.bias", 6, config)
    assert key is not None
    assert key.tolist() == [0, 3, 1, 4, 2, 5]
    assert rotary_order("blk.0.attn_v.weight", 12, config) is None
    assert rotary_order("blk.0.attn_q.weight", 12, config | {"model_type": "qwen2"}) is None


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_a_tokenizer_on_bytes(split: str, tmp_path: Path) -> None:
    tokenizer = byte_level(split)
    tokenizer.save_pretrained(tmp_path)
    found = fields(tmp_path, config_of("llama"))
    own = {name.removeprefix("tokenizer.ggml."): value for name, value in found.items()}
    assert (own["model"], own["pre"]) == ("gpt2", split)
    size = len(tokenizer)
    assert own["tokens"][:size] == tokenizer.convert_ids_to_tokens(range(size))
    assert own["tokens"][size:] == [f"[PAD{i}]" for i in range(size, 400)]
    kinds = [gguf.TokenType(kind).name for kind in own["token_type"]]
    assert kinds == ["NORMAL"] * (size - 3) + ["CONTROL"] * 2 + ["USER_DEFINED"] + ["UNUSED"] * (400 - size)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert own["merges"] == [" ".join(pair) for pair in merges]
    assert (own["bos_token_id"], own["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert (own["add_bos_token"], own["add_eos_token"]) == (split == "llama-bpe", False)
    assert found["tokenizer.chat_template"] == TEMPLATE


def test_a_tokenizer_of_sentencepiece(tmp_path: Path) -> None:
    tokenizer = sentence_piece()
    tokenizer.save_pretrained(tmp_path)
    found = fields(tmp_path, config_of("mistral"))
    own = {name.removeprefix("tokenizer.ggml."): value for name, value in found.items()}
    assert (own["model"], own["add_space_prefix"], own["add_bos_token"]) == ("llama", True, True)
    scores = dict(zip(own["tokens"], own["scores"], strict=True))
    assert scores["▁t"] == 0
    assert 0 > scores["▁th"] > scores["▁the"] > scores["▁ov"] > scores["a"]
    kinds = [gguf.TokenType(kind).name for kind in own["token_type"]]
    assert kinds[:4] == ["UNKNOWN", "CONTROL", "CONTROL", "BYTE"]
    assert kinds[tokenizer.convert_tokens_to_ids("▁the")] == "NORMAL"
    assert kinds[tokenizer.convert_tokens_to_ids("<think>")] == "USER_DEFINED"


def test_merges_that_scores_cannot_tell_are_refused(tmp_path: Path) -> None:
    """Of the ways to make a token one is no merge; or another token's merge comes between two."""
    sentence_piece().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    source = json.loads(file.read_text(encoding="utf-8"))
    merges = source["model"]["merges"]
    twice = next(i for i in range(len(merges) - 1) if "".join(merges[i]) == "".join(merges[i + 1]))
    token = "".join(merges[twice])
    for changed in (merges[:twice] + merges[twice + 1 :], merges[:twice] + merges[twice + 1 :] + [merges[twice]]):
        source["model"]["merges"] = changed
        file.write_text(json.dumps(source), encoding="utf-8")
        with pytest.raises(OptionError, match=rf"that make '{token}' are not those of SentencePiece"):
            fields(tmp_path, config_of("mistral"))


def test_splits_are_those_of_the_models() -> None:
    """Oracle: what transformers' reader makes of the names."""
    for pattern, name in list(SPLITS.items())[2:]:
        assert GGUF_PRE_TOKENIZER_SPLITS[name] == pattern


@pytest.mark.parametrize(
    ("changes", "bits", "group", "said"),
    [
        ({"model_type": "gemma2"}, 4, 32, "'gemma2'.*known: llama, mistral, qwen2, qwen3"),
        ({}, 3, 32, "4 bits, not 3: use --to mlx"),
        ({}, 4, 48, "a multiple of 32 inputs, not 48: .*--group-size 32, 64 or 128"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, 4, 32, "rotary scaling .*'longrope'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "mscale": 2.0}}, 4, 32, "scaling with 'mscale'"),
    ],
)
def test_what_has_no_place_is_refused(changes: dict[str, Any], bits: int, group: int, said: str) -> None:
    gguf_q4_1.check_linears(config_of("llama"), 4, 64)
    with pytest.raises(OptionError, match=said):
        gguf_q4_1.check_linears(config_of("llama", **changes), bits, group)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(OptionError, match="pip install gguf"):
        gguf_q4_1.check_linears(config_of("llama"), 4, 32)


def test_tensors_without_a_place_are_refused(tmp_path: Path) -> None:
    byte_level("qwen2").save_pretrained(tmp_path)
    with pytest.raises(
        OptionError, match=r"tensor 'model\.layers\.0\.mixer\.weight' has no equivalent in a GGUF llama"
    ):
        lay_out(tmp_path, "model.layers.0.mixer.weight")
    with pytest.raises(OptionError, match=r"is torch\.float64, expected torch\.float32, torch\.float16"):
        lay_out(tmp_path, "lm_head.weight", torch.float64)
    shapes = {"model.layers.0.mlp.up_proj": (64, 48)}
    with pytest.raises(OptionError, match="has 48 inputs, expected a multiple of 32"):
        gguf_q4_1.write(tmp_path / "m.gguf", config_of("llama"), tmp_path, shapes, {}, never, never)
    assert not list(tmp_path.glob("*.gguf*"))


def test_values_beyond_float16_are_refused() -> None:
    weight = random_affine(8, 64, 4, 32)
    with pytest.raises(OptionError, match="up to 65504"):
        gguf_q4_1.blocks(AffineWeight(weight.codes, weight.scales * 1e6, weight.shifts, 4))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda source: source["model"].update(merges=[]), "not BPE with 0 merges"),
        (
            lambda source: source["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="x+"),
            r"splits text \(x\+;",
        ),
        (
            lambda source: source["added_tokens"][0].update(id=400),
            "up to id 400, but the embedding of the model has 400 rows",
        ),
    ],
)
def test_tokenizers_of_other_kinds_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    byte_level("qwen2").save_pretrained(tmp_path)
    source = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    change(source)
    (tmp_path / "tokenizer.json").write_text(json.dumps(source), encoding="utf-8")
    with pytest.raises(OptionError, match=said):
        fields(tmp_path, config_of("llama"))


def test_a_tokenizer_of_another_model_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"has no tokenizer\.json, .*save_pretrained"):
        fields(tmp_path, config_of("llama"))
    Tokenizer(models.Unigram([("a", 0.0)])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(OptionError, match="not Unigram"):
        fields(tmp_path, config_of("llama"))
