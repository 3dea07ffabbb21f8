"""Every tensor of an adapter is merged as peft computes it, or it is refused by name.

Covers: loftq/artifacts/pair_checks.py, loftq/artifacts/embeddings.py, loftq/models/adapter_settings.py,
loftq/merging/logits.py, loftq/merging/readers.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, pico_llama, save_model
from peft import LoraConfig, get_peft_model
from picos import pico_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import loftq
from loftq.artifacts.pair import BackboneAndAdapter
from loftq.errors import ArtifactError, LoftQError
from loftq.formats.artifact import open_artifact
from loftq.formats.model_files import module_file_names
from loftq.hub.source import side_files
from loftq.merging.readers import GGUF, active_settings, unread
from loftq.models.adapters import check_adapter

IDS = torch.tensor([[5, 7, 9, 310]])
Tensors = dict[str, torch.Tensor]
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
NORM = "base_model.model.model.norm.weight"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 4-bit weights whose input and output embeddings are the same."""
    scratch = tmp_path_factory.mktemp("tied")
    source = save_model(pico_llama(tie_word_embeddings=True), scratch / "source")
    return loftq.quantize(str(source), output=scratch / "folder", rank=4, iters=1, quiet=True).folder


def adapt(folder: Path, out: Path, rows: int | None = None, **options: Any) -> torch.Tensor:
    """Save a trained adapter of a folder; its logits are returned."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if rows is not None:
        base.resize_token_embeddings(rows)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name or "delta" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    model.save_pretrained(out)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def trained(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "adapter"
    adapt(tied, out)
    return out


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("saved", "rows"),
    [(["embed_tokens", "lm_head"], None), (["embed_tokens"], None), (["embed_tokens", "lm_head"], 328)],
    ids=str,
)
def test_embeddings_of_an_adapter(saved: list[str], rows: int | None, tied: Path, tmp_path: Path) -> None:
    """Oracle: the logits of peft's own model."""
    wanted = adapt(tied, tmp_path / "a", rows, modules_to_save=saved)
    loftq.merge(tied, tmp_path / "a", to="bf16", output=tmp_path / "out", quiet=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["vocab_size"] == (rows or 320)
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert (merged(input_ids=IDS).logits - wanted).norm() < 0.02 * wanted.norm()
        if rows:
            loaded = loftq.load_qlora(tied, tmp_path / "a", dtype=torch.float32, is_trainable=False).eval()
            assert (loaded(input_ids=IDS).logits - wanted).norm() < 0.02 * wanted.norm()  # peft computes in bfloat16


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_new_tokens_come_with_their_tokenizer_and_their_bias(tmp_path: Path) -> None:
    """Oracles: transformers' resizing of BART's bias of tokens, the logits with the adapter, and its tokenizer."""
    source = tmp_path / "source"
    model = pico_model("bart", "seq2seq-lm")
    model.final_logits_bias += torch.linspace(-2, 2, model.final_logits_bias.numel())
    model.save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    (source / "vocab.txt").write_text("of the old tokenizer")
    options: dict[str, Any] = {"rank": 2, "iters": 1, "task": "seq2seq-lm", "quiet": True}
    folder = loftq.quantize(str(source), output=tmp_path / "folder", **options).folder
    base = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    rows = base.config.vocab_size + 8
    base.resize_token_embeddings(rows)
    base.config.vocab_size = rows
    saved = {"modules_to_save": ["shared", "embed_tokens", "lm_head"], "task_type": "SEQ_2_SEQ_LM"}
    peft_model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **saved))
    peft_model.save_pretrained(tmp_path / "a")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "a")
    loftq.merge(folder, tmp_path / "a", to="bf16", output=tmp_path / "out", quiet=True)
    merged, info = AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert torch.equal(merged.final_logits_bias, base.final_logits_bias.to(torch.bfloat16).float())
    with torch.no_grad():
        loaded = loftq.load_qlora(folder, tmp_path / "a", dtype=torch.float32, is_trainable=False).eval()
        wanted = loaded(input_ids=IDS, decoder_input_ids=IDS).logits
        assert (merged(input_ids=IDS, decoder_input_ids=IDS).logits - wanted).norm() < 0.02 * wanted.norm()
    written = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert written.encode("<new>", add_special_tokens=False) == tokenizer.encode("<new>", add_special_tokens=False)
    assert not (tmp_path / "out" / "vocab.txt").exists()


def other(tensors: Tensors, **changes: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for name, change in changes.items():
        tensors[name] = change(tensors[name]).contiguous()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.clear(), "is empty"),
        (lambda t: t.pop(A), "lora_B.*q_proj|q_proj.*complete|q_proj.lora_B"),
        (lambda t: [t.pop(A), t.pop(A.replace("lora_A", "lora_B"))], "lacks the factors of 'model.layers.0"),
        (lambda t: other(t, **{A: lambda a: a[:, :0]}), "is empty in .*lora_A"),
        (lambda t: other(t, **{A: lambda a: a[:, :32]}), "lora_A.weight is"),
        (lambda t: other(t, **{A: lambda a: a.unsqueeze(-1)}), "lora_A.weight is"),
        (lambda t: other(t, **{A: lambda a: a * torch.nan}), "lora_A.weight holds values that are not finite"),
        (lambda t: other(t, **{A: lambda a: a.int()}), "lora_A.weight holds values that are not finite"),
        (lambda t: t.update({A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(64)}), "magnitude_vector"),
        (lambda t: t.update({A.replace("lora_A.weight", "bias"): torch.ones(64)}), "q_proj.bias"),
        (lambda t: t.update({A.replace("self_attn.q_proj.lora_A", "extra"): torch.ones(64)}), "extra.weight"),
        (lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 320)}), "embedding"),
        (lambda t: t.update({NORM: torch.ones(32)}), "norm.weight is"),
    ],
)
def test_a_tensor_that_does_not_belong(change: Any, said: str, tied: Path, trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(LoftQError, match=said):
        loftq.merge(tied, folder, to="bf16", output=tmp_path / "out", check=False, quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainable_token_indices", [5, 7]),
        ("alora_invocation_tokens", [3]),
        ("layer_replication", [[0, 2]]),
        ("use_bdlora", {"nblocks": 2}),
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("init_lora_weights", "pissa"),
        ("a_setting_of_tomorrow", 3),
    ],
)
def test_a_setting_that_merging_does_not_know(key: str, value: Any, tied: Path, trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(LoftQError, match=f"has {key}"):
        loftq.merge(tied, folder, to="bf16", output=tmp_path / "out", check=False, quiet=True)


def test_a_merge_without_one_linear_is_not_kept(
    tied: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Break it: the adapter of one linear of the four is left out."""
    whole = BackboneAndAdapter.delta

    def less(pair: BackboneAndAdapter, module: str) -> torch.Tensor | None:
        return None if "layers.1.self_attn.q_proj" in module else whole(pair, module)

    assert loftq.merge(tied, trained, to="bf16", output=tmp_path / "right", quiet=True).difference < 0.05
    monkeypatch.setattr(BackboneAndAdapter, "delta", less)
    with pytest.raises(ArtifactError, match="outputs of the merged model differ"):
        loftq.merge(tied, trained, to="bf16", output=tmp_path / "out", quiet=True)


@pytest.mark.parametrize("moved", [False, True])
def test_an_adapter_of_the_original_weights(moved: bool, tied: Path, trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "a")
    source = Path(open_artifact(tied).manifest["source"]["model"])
    source = shutil.copytree(source, tmp_path / "moved") if moved else source
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(source)}))
    with pytest.raises(ArtifactError, match=f"was trained on {source}, not on the backbone"):
        check_adapter(open_artifact(tied), folder)
    report = loftq.merge(tied, folder, to="bf16", output=tmp_path / "out", check=False, quiet=True)
    assert f"was trained on {source}" in report.notes[0]


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llama", {}, set()),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}, set()),
        ("llama", {"hidden_act": "gelu"}, {"hidden_act"}),
        ("mistral", {"sliding_window": 8}, {"sliding_window"}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, {"sliding_window"}),
        ("qwen2", {"sliding_window": 8}, set()),
    ],
)
def test_what_a_reader_does_not_read(name: str, changes: dict[str, Any], said: set[str]) -> None:
    """Oracle: the code of both sides, read by hand. The reader has the settings that a GGUF holds, without windows."""
    active = active_settings(pico_model(name, "causal-lm", **changes))
    assert unread(active, GGUF, {}).keys() - {"layer_types", "max_window_layers"} == said


def test_the_modules_of_sentence_transformers(tmp_path: Path) -> None:
    def write(name: str, text: str = "{}") -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    paths = ["", "1_Pooling", "2_Dense"]
    write("modules.json", json.dumps([{"idx": i, "path": path, "type": "x"} for i, path in enumerate(paths)]))
    for name in ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/run.py"):
        write(name)
    write("sentence_bert_config.json")
    write("3_Other/config.json")
    copied = ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"]
    assert module_file_names(tmp_path) == ["modules.json", "sentence_bert_config.json", *copied]
    assert {path.relative_to(tmp_path).as_posix() for path in side_files(tmp_path)} == set(module_file_names(tmp_path))
    (tmp_path / "2_Dense" / "model.safetensors").rename(tmp_path / "2_Dense" / "pytorch_model.bin")
    assert module_file_names(tmp_path) == []  # a pickle is not copied, so the folder would not load
    for path in ("../other", "/etc", ".hidden", "a/b"):
        write("modules.json", json.dumps([{"path": path}]))
        assert module_file_names(tmp_path) == []
