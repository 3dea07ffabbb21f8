"""Calibration statistics against stock transformers models in float64, whole in memory, with hooks on their linears.

Covers: loftq/calibration/block_weights.py, loftq/calibration/forward.py, loftq/calibration/input_files.py,
loftq/calibration/observer.py.
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, pico_llama, save_model
from picos import save_pico
from safetensors.torch import load_file, save_file
from small_models import save_small
from torch import nn

from loftq.calibration import block_weights, windows
from loftq.calibration import forward as forwarding
from loftq.calibration import gather as gathering
from loftq.calibration.gather import gather
from loftq.calibration.observer import VOCABULARY
from loftq.calibration.statistics import Statistics, open_statistics
from loftq.calibration.windows import Calibration, prepare
from loftq.errors import ArtifactError, CheckpointError, OptionError, SourceError
from loftq.hub.source import find_source
from loftq.models import lockstep
from loftq.models.tasks import TASKS, auto_class
from loftq.planning.plan import Plan
from loftq.planning.planner import make_plan
from loftq.planning.recipe import recipe_of
from loftq.planning.weights import read_source_weight

CASES = [
    ("llama", "causal-lm"),
    ("llama", "sequence-classification"),
    ("gpt2", "causal-lm"),
    ("phi3", "causal-lm"),
    ("gemma2", "causal-lm"),
    ("gemma3", "image-text-to-text"),
    ("mixtral", "causal-lm"),
    ("bert", "masked-lm"),
    ("roberta", "question-answering"),
    ("deberta-v2", "feature-extraction"),
    ("albert", "masked-lm"),
    ("bart", "seq2seq-lm"),
    ("bart", "sequence-classification"),
    ("marian", "seq2seq-lm"),
    ("t5", "seq2seq-lm"),
]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "MIN_TOKENS", 256)
    monkeypatch.setattr(gathering, "BATCH_TOKENS", 192)  # three windows, and one batch of the rest


def plan_of(folder: Path, **options: Any) -> Plan:
    return make_plan(find_source(str(folder)), recipe_of(rank=4, **options))


def small(plan: Plan, **options: Any) -> Calibration:
    return prepare(plan, **{"tokens": 512, "sequence_length": 64, **options})


@pytest.fixture(scope="module")
def plan(pico: Path) -> Plan:
    return plan_of(pico)


@pytest.fixture(scope="module")
def gathered(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    """Of the pico llama. Do not write to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "MIN_TOKENS", 256)
        return gather(plan, small(plan), tmp_path_factory.mktemp("gathered") / "cache", quiet=True)


# What it measures


def oracle(plan: Plan, windows: torch.Tensor) -> tuple[dict[str, tuple[torch.Tensor, int]], torch.Tensor]:
    """The mean of x xᵀ and the count of each layer's inputs, and the model's logits or hidden states."""
    dtype = torch.float32 if plan.model_type == "mixtral" else torch.float64  # torch's grouped products know no other
    model = auto_class(plan.task).from_pretrained(plan.source.folder, dtype=dtype).eval()
    sums: dict[str, tuple[Any, int]] = {}

    def watch(name: str) -> None:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else next(iter(kwargs.values()))).double()
            x = x.reshape(-1, x.shape[-1])
            total, count = sums.get(name, (0, 0))
            sums[name] = (total + x.t() @ x, count + len(x))

        model.get_submodule(name).register_forward_pre_hook(see, with_kwargs=True)

    for layer in plan.linears:
        watch(layer.module)
    outputs = []
    for part in torch.split(windows, 3):  # DeBERTa's positions are an input once a batch
        batch = {"input_ids": part, "attention_mask": torch.ones_like(part)}
        if model.config.is_encoder_decoder:
            start = torch.full((len(part), 1), model.config.decoder_start_token_id)
            batch["decoder_input_ids"] = torch.cat([start, part[:, :-1]], 1)
        if plan.model_type == "gemma3":
            batch["token_type_ids"] = torch.zeros_like(part)
        with torch.no_grad():
            outputs.append((model.base_model if plan.task.has_head else model)(**batch)[0].double())
    return {name: (total / count, count) for name, (total, count) in sums.items()}, torch.cat(outputs)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_moments_and_answers_are_those_of_the_model_in_memory(family: str, task: str, tmp_path: Path) -> None:
    plan = plan_of(save_pico(family, task, tmp_path / "model"), task=task)
    calibration = small(plan)
    found = gather(plan, calibration, tmp_path / "cache", quiet=True)
    expected, output = oracle(plan, calibration.windows)
    assert set(expected) == {layer.module for layer in plan.linears if found.count(layer.module)}
    for name, (moment, count) in expected.items():
        ours = found.moment(name)
        assert ours is not None
        assert found.count(name) == count
        assert ours.dtype == torch.float32
        assert float((ours - moment).norm() / moment.norm()) < 1e-5
    answers = found.teacher()
    assert answers is not None
    assert torch.equal(answers["input_ids"].long(), calibration.windows)
    if "hidden" in answers:
        assert task not in ("causal-lm", "masked-lm", "seq2seq-lm")
        torch.testing.assert_close(answers["hidden"].double(), output, rtol=8e-3, atol=8e-3)
    else:
        logs = torch.log_softmax(output, -1)
        picked = logs.gather(-1, answers["indices"].long())
        torch.testing.assert_close(answers["values"].double(), picked, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(picked, logs.topk(256).values, rtol=1e-4, atol=1e-4)


def test_linears_that_get_the_same_input_share_a_file(gathered: Statistics) -> None:
    files: dict[str, set[str]] = {}
    for module, row in gathered.record["modules"].items():
        files.setdefault(row["file"], set()).add(module.removeprefix("model.layers."))
    parts = ({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}, {"mlp.gate_proj", "mlp.up_proj"})
    alone = ({"self_attn.o_proj"}, {"mlp.down_proj"})
    expected = [{f"{i}.{name}" for name in names} for i in range(2) for names in (*parts, *alone)]
    assert sorted(map(sorted, files.values())) == sorted(map(sorted, expected))
    held = {path.name for path in gathered.folder.iterdir()}
    assert held == {*files, "calibration.json", "teacher.safetensors"}


def test_a_block_that_is_visited_again_adds_to_its_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(save_pico("llama", "causal-lm", tmp_path / "model"))
    from transformers.models.llama.modeling_llama import LlamaModel

    once = LlamaModel.forward

    def twice(self: Any, **inputs: Any) -> Any:
        """Through all layers again, from the same tokens shifted by one."""
        once(self, **inputs)
        return once(self, **{**inputs, "input_ids": inputs["input_ids"].roll(1, 1)})

    monkeypatch.setattr(LlamaModel, "forward", twice)
    calibration = small(plan)
    found = gather(plan, calibration, tmp_path / "cache", quiet=True)
    for name, (moment, count) in oracle(plan, calibration.windows)[0].items():
        ours = found.moment(name)
        assert ours is not None
        assert found.count(name) == count == 2 * calibration.tokens
        assert float((ours - moment).norm() / moment.norm()) < 1e-5
    assert len(list(found.folder.glob("moment-*"))) == 8


def test_results_repeat_to_the_bit(plan: Plan, gathered: Statistics, tmp_path: Path) -> None:
    again = gather(plan, small(plan), tmp_path / "again", quiet=True)
    for path in gathered.folder.glob("*.safetensors"):
        if path.name != "teacher.safetensors":
            found, expected = load_file(again.folder / path.name), load_file(path)
            for name, tensor in expected.items():  # batches were of another size
                torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    once_more = gather(plan, small(plan), tmp_path / "more", quiet=True)
    for path in again.folder.glob("*.safetensors"):
        assert path.read_bytes() == (once_more.folder / path.name).read_bytes()


# What it holds in memory


@pytest.mark.parametrize("family", ["llama", "mixtral", "t5"])
def test_one_block_at_a_time_has_its_weights(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"num_layers": 5} if family == "t5" else {"num_hidden_layers": 5}
    task = "seq2seq-lm" if family == "t5" else "causal-lm"
    plan = plan_of(save_pico(family, task, tmp_path / "model", **changes))
    held: list[set[str]] = []
    forward = lockstep._Call.run

    def spy(call: Any) -> Any:
        module = call._forward.__self__  # the block
        real = {name for name, block in blocks.items() if any(not p.is_meta for p in block.parameters())}
        assert not any(p.is_meta for p in module.parameters())
        held.append(real)
        return forward(call)

    built = block_weights.BlockWeights(plan, torch.device("cpu"))
    blocks = built.blocks
    assert len(blocks) == (7 if family == "t5" else 5)
    assert all(p.is_meta for block in blocks.values() for p in block.parameters())
    monkeypatch.setattr(forwarding, "BlockWeights", lambda *_, **__: built)
    monkeypatch.setattr(lockstep._Call, "run", spy)
    gather(plan, small(plan), tmp_path / "cache", quiet=True)
    assert {len(names) for names in held} == {1}
    assert set().union(*held) == set(blocks)
    assert all(p.is_meta for block in blocks.values() for p in block.parameters())


def test_tied_weights_are_held_once(tmp_path: Path) -> None:
    plan = plan_of(save_model(pico_llama(tie_word_embeddings=True), tmp_path / "tied"))
    model: Any = block_weights.BlockWeights(plan, torch.device("cpu")).model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


# What it keeps, and for whom


@pytest.fixture
def cached(gathered: Statistics, tmp_path: Path) -> Path:
    """A copy of the folder, and of the model behind it."""
    return Path(shutil.copytree(gathered.folder, tmp_path / "cache"))


@pytest.fixture
def no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model runs")

    monkeypatch.setattr(forwarding, "run_in_lockstep", refuse)


@pytest.mark.usefixtures("no_run")
def test_a_folder_is_reused(plan: Plan, cached: Path, gathered: Statistics) -> None:
    again = gather(plan, small(plan), cached, quiet=True)
    assert again.record == gathered.record
    assert again.tokens == 512
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(again.moment(name), gathered.moment(name))  # type: ignore[arg-type]
    fewer = plan_of(plan.source.folder, target_modules=("q_proj",))
    assert gather(fewer, small(fewer), cached, quiet=True).record == gathered.record


def test_a_folder_that_lacks_a_layer_is_made_again(plan: Plan, tmp_path: Path) -> None:
    fewer = plan_of(plan.source.folder, target_modules=("q_proj",))
    gather(fewer, small(fewer), tmp_path / "cache", quiet=True)
    with pytest.raises(ArtifactError, match=r"has no statistics of model\.layers\.0\.self_attn\.k_proj: remove the"):
        open_statistics(tmp_path / "cache", plan)
    found = gather(plan, small(plan), tmp_path / "cache", quiet=True)
    assert all(found.moment(layer.module) is not None for layer in plan.layers)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.usefixtures("no_run")
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"seed": 1}, OptionError, "seed 0, not 1"),
        ({"tokens": 1024}, OptionError, "tokens 512, not 1024"),
        ({"sequence_length": 32}, OptionError, "sequence_length 64, not 32"),
        ({"text": "other"}, ArtifactError, "a different text"),
        ({"target_modules": ("q_proj",), "seed": 1}, OptionError, "seed 0, not 1"),
    ],
)
def test_a_folder_of_other_settings_is_refused(
    options: dict[str, Any], error: type[Exception], match: str, plan: Plan, cached: Path, tmp_path: Path
) -> None:
    if "text" in options:
        (tmp_path / "other.txt").write_text("Another text altogether. " * 400)
        options = {"text": str(tmp_path / "other.txt")}
    if "target_modules" in options:
        plan = plan_of(plan.source.folder, target_modules=options.pop("target_modules"))
    calibration = small(plan, **options)
    assert calibration.key != small(plan).key
    with pytest.raises(error, match=rf"{cached.name}.*{match}.*: remove the folder to gather the statistics again"):
        gather(plan, calibration, cached, quiet=True)


@pytest.mark.usefixtures("no_run")
def test_a_folder_of_another_model_or_tokenizer_is_refused(plan: Plan, cached: Path, tmp_path: Path) -> None:
    deeper = plan_of(save_model(pico_llama(num_hidden_layers=3), tmp_path / "deeper"))
    with pytest.raises(
        ArtifactError, match=r"was gathered with .*pico-llama, whose tensors differ from those of .*deeper"
    ):
        gather(deeper, small(deeper), cached, quiet=True)
    other = Path(shutil.copytree(plan.source.folder, tmp_path / "other"))
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["Bennet"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ArtifactError, match="a different tokenizer"):
        gather(plan_of(other), small(plan_of(other)), cached, quiet=True)


def test_a_weight_that_has_changed_is_refused(plan: Plan, gathered: Statistics, tmp_path: Path) -> None:
    for layer in plan.layers:
        gathered.check_weights(layer.module, {layer.tensor: read_source_weight(plan, layer, torch.device("cpu"))[1]})
    folder = Path(shutil.copytree(plan.source.folder, tmp_path / "tuned"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tuned = plan_of(folder)
    statistics = open_statistics(gathered.folder, tuned)  # headers do not tell
    refused = []
    for layer in tuned.layers:
        try:
            statistics.check_weights(
                layer.module, {layer.tensor: read_source_weight(tuned, layer, torch.device("cpu"))[1]}
            )
        except ArtifactError as error:
            refused.append(str(error))
    assert [error.split(": ")[0] for error in refused] == [
        f"{gathered.folder} was gathered with a different model.layers.1.mlp.up_proj.weight"
    ]


@pytest.mark.usefixtures("no_run")
@pytest.mark.parametrize("damage", ["no record", "record", "version", "moment", "in the way"])
def test_a_damaged_folder_is_named(damage: str, plan: Plan, cached: Path) -> None:
    record = cached / "calibration.json"
    if damage == "no record":
        record.unlink()
    elif damage == "record":
        record.write_text(record.read_text()[:-20])
    elif damage == "version":
        record.write_text(json.dumps({**json.loads(record.read_text()), "version": 99}))
    elif damage == "moment":
        (cached / "moment-00001.safetensors").write_bytes(b"damaged")
    else:
        shutil.rmtree(cached)
        cached.write_text("a file")
    with pytest.raises(ArtifactError, match=rf"{cached}.*(remove the folder|name another folder)"):
        gather(plan, small(plan), cached, quiet=True).moment("model.layers.0.self_attn.q_proj")


# What can go wrong on the way


def test_a_layer_that_is_never_reached_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(save_pico("llama", "causal-lm", tmp_path / "model"))
    from transformers.models.llama.modeling_llama import LlamaMLP

    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, x: self.down_proj(self.act_fn(self.up_proj(x)) * x.repeat(1, 1, 2))
    )
    found = gather(plan, small(plan), tmp_path / "cache", quiet=True)
    assert found.notes == (
        "the calibration text never reached model.layers.0.mlp.gate_proj, model.layers.1.mlp.gate_proj",
    )
    assert found.moment("model.layers.0.mlp.gate_proj") is None
    assert found.count("model.layers.0.mlp.gate_proj") == 0
    assert found.moment("model.layers.0.mlp.up_proj") is not None


def test_activations_that_overflow_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model = pico_llama()
    model.model.layers[1].input_layernorm.weight.data[0] = 3e38
    plan = plan_of(save_model(model, tmp_path / "model"))
    with pytest.raises(
        SourceError, match=r"the inputs of model\.layers\.1\.self_attn\.q_proj are not finite in float32"
    ):
        gather(plan, small(plan), tmp_path / "cache", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not [thread for thread in threading.enumerate() if thread.name == "loftq-lockstep"]


def test_answers_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    model = pico_llama()
    model.model.norm.weight.data[:] = 3e38
    plan = plan_of(save_model(model, tmp_path / "model"))
    with pytest.raises(
        SourceError,
        match=r"calibration: .*model answers with NaN in float32: the weights may be damaged, download them again",
    ):
        gather(plan, small(plan), tmp_path / "cache", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_damaged_weight_is_named(tmp_path: Path) -> None:
    model = pico_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    plan = plan_of(save_model(model, tmp_path / "model"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.* 1 NaN or Inf"):
        gather(plan, small(plan), tmp_path / "cache", quiet=True)
    assert not [thread for thread in threading.enumerate() if thread.name == "loftq-lockstep"]


def test_an_input_that_is_overwritten_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(save_pico("llama", "causal-lm", tmp_path / "model"))
    from transformers.models.llama.modeling_llama import LlamaMLP

    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x) + 0 * self.gate_proj(x)) + x.zero_()
    )
    with pytest.raises(
        SourceError, match=r"model\.layers\.0\.mlp\.up_proj cannot be calibrated, because its input is overwritten"
    ):
        gather(plan, small(plan), tmp_path / "cache", quiet=True)


def test_a_model_that_does_not_read_text_is_refused(tmp_path: Path) -> None:
    plan = plan_of(save_pico("vit", "image-classification", tmp_path / "model"))
    with pytest.raises(SourceError, match="does not read text"):
        prepare(plan)


@pytest.mark.parametrize(
    ("kind", "task", "said"),
    [
        ("clip", "feature-extraction", "does not read text"),  # its input is tokens, and its embeddings lie in a part
        ("whisper", "speech-seq2seq", "does not read text"),
        ("bros", "token-classification", "fails on the calibration text .*bbox"),
    ],
)
def test_a_model_that_needs_more_than_text_is_refused_in_one_line(
    kind: str, task: str, said: str, tmp_path: Path
) -> None:
    plan = plan_of(save_small(kind, task, tmp_path / "model"), task=task)
    with pytest.raises(SourceError, match=said) as refused:
        gather(plan, small(plan), tmp_path / "cache", quiet=True)
    assert "quantize it without --calibration" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_tasks_of_the_table_are_known() -> None:
    assert set(VOCABULARY) < set(TASKS)
