"""Tasks and their heads: which class is built, where a head lies, how it comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZES, save_model
from peft import PeftModel
from picos import output_of, pico_model, save_pico
from processes import run_python
from safetensors.torch import load_file
from small_models import small_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
)

import loftq
from loftq.errors import CheckpointError, SourceError
from loftq.models.tasks import TASKS, auto_class, build_meta

HEADS = {
    "bert": ["classifier"],
    "roberta": ["classifier"],
    "deberta-v2": ["pooler", "classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "bart": ["classification_head"],
    "llama": ["score"],
}


def quantize(source: Path, out: Path, **options: Any) -> loftq.solving.report.Report:  # type: ignore[name-defined]
    return loftq.quantize(str(source), output=out, **{"rank": 4, "iters": 1, "quiet": True, **options})


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked language model: what an encoder comes as, with no pooler and no classifier."""
    return save_pico("bert", "masked-lm", tmp_path_factory.mktemp("mlm") / "bert")


@pytest.mark.parametrize("task", TASKS)
def test_the_task_is_that_of_the_architecture(task: str, tmp_path: Path) -> None:
    """Oracle: transformers' own class for the task."""
    name = {
        "seq2seq-lm": "bart",
        "speech-seq2seq": "whisper",
        "ctc": "wav2vec2",
        "causal-lm": "gpt2",
        "image-classification": "vit",
        "image-text-to-text": "gemma3",
    }.get(task, "bert")
    model = small_model(name, task)
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [type(model).__name__]}))
    built, found = build_meta(tmp_path)
    assert found.name == task
    assert type(built) is type(model)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_in_the_adapter_alone(name: str, tmp_path: Path) -> None:
    """Oracle: the tensors of the source."""
    source = save_pico(name, "sequence-classification", tmp_path / "source")
    folder = quantize(source, tmp_path / "out").folder
    tensors = load_file(source / "model.safetensors")
    head = {key: tensor for key, tensor in tensors.items() if key.split(".")[0] in HEADS[name]}
    adapter = load_file(folder / "loftq_init" / "adapter_model.safetensors")
    assert not set(head) & set(load_file(folder / "model.safetensors"))
    saved = {key for key in adapter if ".lora_" not in key}
    assert saved == {f"base_model.model.{key}" for key in head}
    assert all(torch.equal(adapter[f"base_model.model.{key}"], tensor.float()) for key, tensor in head.items())
    config = json.loads((folder / "loftq_init" / "adapter_config.json").read_text())
    assert sorted(config["modules_to_save"]) == sorted(HEADS[name])


def test_a_trained_head_survives_save_and_reload(tmp_path: Path) -> None:
    """Oracle: the logits before saving, by stock peft and by load_qlora."""
    folder = quantize(save_pico("bert", "sequence-classification", tmp_path / "source"), tmp_path / "out").folder
    model = loftq.load_qlora(folder)
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert head.weight.dtype == torch.float32
    assert head.weight.requires_grad
    before = head.weight.detach().clone()
    model.train()
    output_of(model, model.base_model.model).square().mean().backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5).step()
    assert not torch.equal(head.weight, before)  # in bfloat16 such a step would be lost
    with torch.no_grad():
        wanted = output_of(model.eval(), model.base_model.model)
    model.save_pretrained(tmp_path / "trained")

    again = loftq.load_qlora(folder, tmp_path / "trained").eval()
    with torch.no_grad():
        assert torch.equal(output_of(again, again.base_model.model), wanted)
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    stock = PeftModel.from_pretrained(base, tmp_path / "trained")
    found = stock.base_model.model.classifier.modules_to_save["default"].weight
    assert torch.equal(found, head.weight.detach().to(found.dtype))


def test_a_new_task_begins_a_head_that_the_seed_decides(pretrained: Path, tmp_path: Path) -> None:
    """Oracle: the initialization of the class itself, normal with the config's own spread."""
    key = "base_model.model.classifier.weight"
    reports = [
        quantize(pretrained, tmp_path / str(i), task="sequence-classification", num_labels=5, seed=seed, workers=w)
        for i, (seed, w) in enumerate([(1, 1), (1, 3), (2, 1)])
    ]
    first, again, other = (load_file(r.folder / "loftq_init" / "adapter_model.safetensors")[key] for r in reports)
    assert first.shape == (5, 64)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std().item() == pytest.approx(0.02, rel=0.2)
    adapter = load_file(reports[0].folder / "loftq_init" / "adapter_model.safetensors")
    assert "base_model.model.bert.pooler.dense.weight" in adapter  # newly initialized too, it must train with the head
    assert any("newly initialized: " in note and "classifier.weight" in note for note in reports[0].notes)
    assert any("left out: cls.predictions" in note for note in reports[0].notes)
    config = json.loads((reports[0].folder / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert len(config["id2label"]) == 5
    model = loftq.load_qlora(reports[0].folder)
    assert torch.equal(model.base_model.model.classifier.modules_to_save["default"].weight, first)


def test_a_head_of_another_size_begins_anew(tmp_path: Path) -> None:
    source = save_pico("roberta", "token-classification", tmp_path / "source")
    report = quantize(source, tmp_path / "out", num_labels=3)
    adapter = load_file(report.folder / "loftq_init" / "adapter_model.safetensors")
    assert adapter["base_model.model.classifier.weight"].shape == (3, 64)
    base = AutoModelForTokenClassification.from_pretrained(report.folder)
    assert PeftModel.from_pretrained(base, report.folder, subfolder="loftq_init").base_model.model.num_labels == 3
    same = quantize(source, tmp_path / "same", num_labels=8)
    assert not any("newly initialized" in note for note in same.notes)


def test_a_missing_pooler_begins_anew(pretrained: Path, tmp_path: Path) -> None:
    report = quantize(pretrained, tmp_path / "out", task="feature-extraction")
    backbone = load_file(report.folder / "model.safetensors")
    assert backbone["pooler.dense.weight"].std().item() == pytest.approx(0.02, rel=0.2)
    assert not backbone["pooler.dense.bias"].any()
    assert not any("pooler" in row["name"] for row in report.layers)
    assert any("newly initialized: pooler.dense" in note for note in report.notes)


def test_a_missing_layer_does_not(pretrained: Path, tmp_path: Path) -> None:
    config = json.loads((pretrained / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((pretrained / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'bert.encoder.layer.2"):
        quantize(tmp_path, tmp_path / "out")


def test_with_and_without_the_base_models_prefix(tmp_path: Path) -> None:
    """An encoder saved as `BertModel` and as `BertForMaskedLM` gives one classifier: the same bytes."""
    torch.manual_seed(0)
    whole = BertForMaskedLM(BertConfig(**SIZES)).bfloat16()
    save_model(whole, tmp_path / "whole")
    base = BertModel(BertConfig(**SIZES), add_pooling_layer=True).bfloat16()
    base.load_state_dict(whole.bert.state_dict(), strict=False)
    save_model(base, tmp_path / "base")
    folders = [
        quantize(tmp_path / name, tmp_path / f"{name}-out", task="token-classification", num_labels=4).folder
        for name in ("whole", "base")
    ]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1


@pytest.mark.parametrize("name", ["bart", "t5", "t5/gated", "marian", "bert"])
def test_shards_and_ties_change_nothing(name: str, tmp_path: Path) -> None:
    """Oracle: the run on one file. Tied embeddings are tied again, and lie on disk once."""
    task = "masked-lm" if name == "bert" else "seq2seq-lm"
    model = pico_model(name, task)
    one = quantize(save_model(model, tmp_path / "one"), tmp_path / "out-one").folder
    many = quantize(save_model(model, tmp_path / "many", max_shard_size="60KB"), tmp_path / "out-many").folder
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert (one / "model.safetensors").read_bytes() == (many / "model.safetensors").read_bytes()
    loaded = auto_class(TASKS[task]).from_pretrained(one)
    head, embeddings = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (head is embeddings) == tied
    shape = list(embeddings.shape)
    copies = [key for key, tensor in load_file(one / "model.safetensors").items() if list(tensor.shape) == shape]
    assert len(copies) == (1 if tied else 2)


@pytest.mark.parametrize(
    ("architecture", "advice"), [("LlamaForCausalLM", "; --task causal-lm keeps them"), ("LlamaForNothing", "")]
)
def test_weights_that_a_task_has_no_place_for_are_named_with_their_share(
    architecture: str, advice: str, tmp_path: Path
) -> None:
    """Oracle: the number of weights in the head of the checkpoint."""
    model = pico_model("llama", "causal-lm")
    source = save_model(model, tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"architectures": [architecture]}
    (source / "config.json").write_text(json.dumps(config))
    share = model.lm_head.weight.numel() / sum(
        tensor.numel() for tensor in load_file(source / "model.safetensors").values()
    )
    report = quantize(source, tmp_path / "out", task="feature-extraction", dry_run=True)
    assert f"not a part of the model, left out: lm_head.weight ({share:.1%} of the weights{advice})" in report.notes


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_its_own_runs_where_it_is_trusted(tmp_path: Path) -> None:
    """Oracle: the modules of the class that the code defines."""
    source = save_pico("llama", "causal-lm", tmp_path / "own")
    (source / "own_code.py").write_text(OWN_CODE)
    config = json.loads((source / "config.json").read_text())
    auto = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"}
    config |= {"model_type": "own-llama", "architectures": ["OwnForCausalLM"], "auto_map": auto}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="--trust-remote-code"):
        quantize(source, tmp_path / "refused")
    report = quantize(source, tmp_path / "out", trust_remote_code=True)
    assert len(report.layers) == 14
    assert any("not in the table of families" in note for note in report.notes)
    assert (report.folder / "own_code.py").read_text() == OWN_CODE
    base = AutoModelForCausalLM.from_pretrained(report.folder, trust_remote_code=True)
    assert type(base).__name__ == "OwnForCausalLM"
    assert isinstance(PeftModel.from_pretrained(base, report.folder, subfolder="loftq_init"), PeftModel)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("falcon", "causal-lm"),
        ("t5", "seq2seq-lm"),
        ("bert", "sequence-classification"),
        ("vit", "image-classification"),
        ("deberta", "question-answering"),
    ],
)
def test_the_lines_of_the_card_load_it(name: str, task: str, tmp_path: Path) -> None:
    """Oracle: a process that runs the card's lines as they are."""
    folder = quantize(save_pico(name, task, tmp_path / "source"), tmp_path / "out").folder
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace('MODEL_DIR = "..."', f"MODEL_DIR = {str(folder)!r}")
    code += "\nprint(type(base_model).__name__, sum('lora_A' in name for name, _ in model.named_parameters()))"
    ended = run_python(code)
    layers = len(json.loads((folder / "loftq.json").read_text())["layers"])
    built = type(build_meta(folder)[0]).__name__
    assert ended.stdout.split() == [built, str(layers)], ended.stderr
