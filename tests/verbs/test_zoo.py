"""The zoo: each recipe is planned from its config alone, and the page of the zoo is what its command prints.

Oracles: the numbers of parameters that the models' authors published; plans of the same models from their checkpoints;
sizes counted by hand; what torch's allocator reports of a training step.

Covers: cli/zoo.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Result, byte_tokenizer, pico_llama
from hub import Hub, client_of, serve
from picos import save_pico
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import loftq
from loftq.errors import OptionError
from loftq.hub.source import find_source
from loftq.planning.footprint import footprint
from loftq.planning.planner import make_plan
from loftq.planning.recipe import recipe_of
from loftq.verbs.zoo import config_source, markdown, read_entry, table, zoo

Run = Callable[..., Result]
PAGE = Path(__file__).parents[2] / "model_zoo" / "README.md"
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "codellama/CodeLlama-7b-hf": 6_738_546_688,
    "codellama/CodeLlama-13b-hf": 13_016_028_160,
    "microsoft/phi-2": 2_779_683_840,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "mistralai/Mistral-Small-24B-Instruct-2501": 23_572_403_200,
    "facebook/bart-large": 406_291_456,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "google/gemma-2-9b-it": 9_241_705_984,
    "google/gemma-3-1b-it": 999_885_952,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "allenai/OLMo-2-1124-7B-Instruct": 7_298_617_344,
}
ORIGINAL = {
    ("meta-llama/Meta-Llama-3-8B", 4, 64),
    ("codellama/CodeLlama-7b-hf", 4, 64),
    ("codellama/CodeLlama-13b-hf", 4, 64),
    ("microsoft/phi-2", 4, 64),
    ("meta-llama/Llama-2-7b-hf", 4, 64),
    ("meta-llama/Llama-2-13b-hf", 4, 64),
    ("meta-llama/Llama-2-70b-hf", 4, 64),
    ("mistralai/Mistral-7B-v0.1", 4, 64),
    ("mistralai/Mistral-7B-v0.1", 4, 32),
    ("facebook/bart-large", 4, 8),
    ("facebook/bart-large", 4, 16),
    ("facebook/bart-large", 4, 32),
    ("facebook/bart-large", 2, 8),
}


@pytest.mark.parametrize("name", list(zoo()))
def test_each_recipe_is_planned_from_its_config(name: str) -> None:
    entry = zoo()[name]
    plan = entry.plan
    assert sum(parameter.numel() for parameter in plan.model.parameters()) == PUBLISHED[entry.model]
    assert plan.source.name == entry.model
    assert not plan.created
    assert not any("generic" in note for note in plan.notes)
    left = PUBLISHED[entry.model] - plan.weights  # embeddings, norms, biases and the head, in 16 bits
    expected = plan.weights * (entry.recipe.bits + 0.5 * (entry.recipe.bits == 4) + 0.25 * (entry.recipe.bits == 2)) / 8
    assert plan.backbone_bytes == pytest.approx(expected + 2 * left, rel=2e-3)
    sides = sum(sum(layer.shape) for layer in plan.layers)
    assert plan.adapter.nbytes == pytest.approx(4 * entry.recipe.rank * sides, rel=5e-3)


def test_all_that_was_published_first_and_a_dozen_more() -> None:
    held = {(entry.model, entry.recipe.bits, entry.recipe.rank) for entry in zoo().values()}
    assert held >= ORIGINAL
    assert len(held - ORIGINAL) >= 12
    assert {entry.model for entry in zoo().values()} == set(PUBLISHED)


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "run `make zoo`"


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("llama", "causal-lm"),
        ("phi3", "causal-lm"),
        ("gemma3_text", "causal-lm"),
        ("qwen2_moe", "causal-lm"),
        ("gpt2", "causal-lm"),
        ("bart", "seq2seq-lm"),
        ("t5", "seq2seq-lm"),
        ("bert", "sequence-classification"),
    ],
)
def test_a_config_alone_plans_as_the_checkpoint(name: str, task: str, tmp_path: Path) -> None:
    """Oracle: the plan from the tensors on disk."""
    folder = save_pico(name, task, tmp_path / "whole")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((folder / "config.json").read_text())
    whole = make_plan(find_source(str(folder)), recipe_of(rank=4))
    bare = make_plan(config_source("a/model", tmp_path / "bare"), recipe_of(rank=4))
    assert [(layer.module, layer.shape) for layer in bare.layers] == [(row.module, row.shape) for row in whole.layers]
    assert bare.layer_bits == whole.layer_bits
    assert bare.adapter.nbytes == whole.adapter.nbytes
    tensors = [
        {name: spec for shard in plan.backbone for name, (_, spec) in shard.offsets.items()} for plan in (bare, whole)
    ]
    sizes = [sum(spec.nbytes for spec in found.values()) for found in tensors]
    assert sizes[0] == sizes[1]
    assert bare.source_bytes == whole.source_bytes


@pytest.mark.slow
def test_training_takes_what_is_estimated(tmp_path: Path) -> None:
    """Oracle: the peak of what torch allocates in a step, as its profiler reports it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 8}
    for vocabulary, tokens in ((1000, 256), (16000, 256)):
        config = LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=vocabulary)
        source = tmp_path / f"source-{vocabulary}"
        LlamaForCausalLM(config).bfloat16().save_pretrained(source)
        folder = loftq.quantize(source, rank=16, iters=0, output=tmp_path / f"out-{vocabulary}", quiet=True).folder
        expected = footprint(make_plan(find_source(str(source)), recipe_of(rank=16)), tokens)
        assert expected.disk == sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        model = loftq.load_qlora(folder)
        model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        ids = torch.randint(0, vocabulary, (1, tokens))

        def step(model: torch.nn.Module, ids: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
            model.train()(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

        measured = peak_of(lambda step=step, model=model, ids=ids, opt=optimizer: step(model, ids, opt))
        assert 0.75 < (expected.train - expected.disk) / measured < 1.5


def peak_of(work: Callable[[], None]) -> int:
    """Bytes that were allocated at once while it ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    assert found.profiler is not None
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_list_and_show(run: Run) -> None:
    lines = run("zoo", "list", "--wide").stdout.splitlines()
    assert len(lines) == 1 + len(zoo())
    assert lines[0].split() == ["recipe", "model", "bits", "rank", "on", "disk", "to", "load", "to", "train"]
    rows = {row["name"]: row for row in json.loads(run("zoo", "list", "--json").stdout)}
    row = rows["mistral-7b-rank32"]
    assert (row["model"], row["bits"], row["rank"]) == ("mistralai/Mistral-7B-v0.1", 4, 32)
    assert row["disk"] < row["load"] < row["train"] < rows["mistral-7b-rank64"]["train"]
    assert rows == {row["name"]: row for row in table()}, "run `make zoo` and commit it"
    assert run("zoo", "list", "--markdown").stdout == PAGE.read_text(encoding="utf-8")
    shown = run("zoo", "show", "mistral-7b-rank32").stdout
    assert "loftq quantize mistralai/Mistral-7B-v0.1 --bits 4 --rank 32" in shown
    assert 'model = "mistralai/Mistral-7B-v0.1"\n' in shown
    assert "import loftq before" in run("zoo", "show", "bart-large-2bit-rank8").stdout


@pytest.mark.parametrize("verb", ["show", "build"])
def test_a_name_that_is_in_no_zoo(verb: str, run: Run) -> None:
    result = run("zoo", verb, "mistral-7b-rank23")
    assert result.exit_code == 2
    assert "unknown recipe 'mistral-7b-rank23'; did you mean mistral-7b-rank32?" in result.stderr


def test_build_is_quantize_with_the_recipe(run: Run, tmp_path: Path) -> None:
    """Oracle: the bytes of `quantize` with the settings of the file."""
    source = tmp_path / "repository"
    pico_llama(num_key_value_heads=4).save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    with serve(Hub()) as hub, client_of(hub.endpoint, tmp_path / "hf"):
        hub.add("meta-llama/Llama-2-7b-hf", source)
        assert run("zoo", "build", "llama-2-7b", "--save-dir", tmp_path, "--quiet").exit_code == 0
        words = ("--bits", 4, "--rank", 64, "--iter", 5, "--output", tmp_path / "same", "--quiet")
        assert run("quantize", "meta-llama/Llama-2-7b-hf", *words).exit_code == 0
    built = tmp_path / "Llama-2-7b-hf-4bit-64rank"
    for name in ("model.safetensors", "loftq_init/adapter_model.safetensors", "README.md"):
        assert (built / name).read_bytes() == (tmp_path / "same" / name).read_bytes()


def test_a_build_is_planned_offline(run: Run, tmp_path: Path) -> None:
    """Oracle: the figures of `zoo list`, and of `zoo show`, which read the same config."""
    with client_of("http://127.0.0.1:9", tmp_path / "away"):
        ended = run("zoo", "build", "llama-2-7b", "--dry-run", "--json", "--save_dir", tmp_path)
    assert ended.exit_code == 0, ended.stderr
    planned = json.loads(ended.stdout)
    assert planned["folder"] == str(tmp_path / "Llama-2-7b-hf-4bit-64rank")
    totals = planned["totals"]
    assert totals["backbone_bytes"] + totals["adapter_bytes"] == zoo()["llama-2-7b"].footprint.disk
    assert not list(tmp_path.glob("Llama*"))


def test_build_takes_the_options_that_no_recipe_has(run: Run) -> None:
    text = run("zoo", "build", "--help").stdout
    for option in ("--device", "--push", "--calibration", "--output", "--resume"):
        assert option in text
    for option in ("--bits", "--rank", "--revision", "--model-name-or-path"):
        assert option not in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model = ", "x.toml is not valid TOML"),
        ("bits = 4", "x.toml names no model"),
        ("model = 7", "x.toml names no model"),
        ('model = "a/b"\nranks = 4', "unknown setting in x.toml 'ranks'; did you mean rank?"),
    ],
)
def test_a_file_that_is_no_recipe(text: str, said: str) -> None:
    with pytest.raises(OptionError) as caught:
        read_entry("x", text)
    assert said in str(caught.value)
