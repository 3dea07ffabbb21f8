"""A mixture of experts through every command. Oracles: the loss of the dense merged model, an undisturbed run's bytes.

Covers: loftq/planning/experts.py, loftq/planning/keywords.py, loftq/planning/weights.py, loftq/solving/layers.py,
loftq/models/expert_offload.py.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import hashes
from mixtures import save_mixture
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import loftq
from loftq.errors import OptionError, UnknownNameError
from loftq.formats.adapter import open_adapter
from loftq.hub.source import find_source
from loftq.models import expert_groups, expert_moves
from loftq.models.packed_experts import PackedExperts
from loftq.planning.planner import make_plan
from loftq.planning.recipe import recipe_of

Run = Callable[..., Any]
OPTIONS: dict[str, Any] = {"rank": 8, "iters": 1, "block_size": 32, "expert_bits": 2, "expert_rank": 2, "quiet": True}
TOKENS = torch.randint(6, 290, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixture("qwen3_moe", tmp_path_factory.mktemp("mixture") / "pico")


@pytest.fixture(scope="module")
def artifact(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loftq.quantize(str(mixture), output=tmp_path_factory.mktemp("artifact") / "out", **OPTIONS).folder


def test_experts_have_their_own_bits_and_rank(artifact: Path) -> None:
    rows = json.loads((artifact / "loftq.json").read_text())["layers"]
    kinds = {(len(row["shape"]), row["codebook"]) for row in rows}
    assert kinds == {(2, "nf4"), (3, "nf2")}
    adapter = open_adapter(artifact / "loftq_init")
    for module in adapter.modules:
        experts = adapter.experts(module)
        assert adapter.shapes[adapter.keys(module)[0]][0] == (2 * experts if experts else 8)
        assert adapter.scaling_of(module) == pytest.approx(1)
    assert adapter.config["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def test_the_plan_says_what_stays(mixture: Path, run: Run) -> None:
    """Oracle: the parameters of the model."""
    shown = run("quantize", mixture, "--rank", 4, "--block-size", 32, "--dry-run").stdout
    model = AutoModelForCausalLM.from_pretrained(mixture)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    left = sum(size for name, size in sizes.items() if "_proj" not in name)
    assert f"{left / sum(sizes.values()):.1%} of the weights stay in bfloat16: embeddings and head" in shown
    assert "2 x gate_up_proj (4 x 192 x 64), nf4" in shown
    assert "rank 4, of experts 4" in shown
    kept = run("quantize", mixture, "--rank", 4, "--exclude-modules", "experts", "--dry-run").stdout
    assert "because they are excluded" in kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_bits": 8}, "--expert-bits 8: nf does not have this width: choose 2, 3, 4"),
        (
            {"expert_bits": 2, "format": "bitsandbytes"},
            "--expert-bits: --format bitsandbytes leaves fused experts in 16",
        ),
        (
            {"expert_rank": 2, "adapter": "qalora", "block_size": None},
            "--expert-rank: --adapter qalora leaves fused experts in 16 bits",
        ),
        ({"expert_rank": 100}, "--expert-rank 100 is larger than the smaller side of model.layers.0.mlp.experts"),
        ({"dropout": 0.1}, "--dropout 0.1: peft has no dropout for fused experts"),
        ({"block_size": 128}, "--block-size 128 does not divide its 64 inputs"),
        ({"target_modules": ["experts"]}, "--target-modules names only fused experts"),
    ],
)
def test_settings_that_experts_cannot_have(options: dict[str, Any], message: str, mixture: Path) -> None:
    with pytest.raises(OptionError, match=message):
        make_plan(find_source(str(mixture)), recipe_of(**{"rank": 4, "block_size": 32, **options}))


def test_the_same_bytes_on_any_number_of_workers_and_after_a_kill(
    mixture: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the undisturbed run. The second run breaks off after the first expert of the second parameter."""
    from loftq.solving import layers

    solve, calls = layers.solve_layer, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments[1].module)
        if len([name for name in calls if ".experts." in name]) == 6:
            raise KeyboardInterrupt
        return solve(*arguments)

    monkeypatch.setattr(layers, "solve_layer", interrupted)
    options = {**OPTIONS, "output": tmp_path / "out"}
    with pytest.raises(KeyboardInterrupt):
        loftq.quantize(str(mixture), workers=1, **options)
    monkeypatch.setattr(layers, "solve_layer", solve)
    folder = loftq.quantize(str(mixture), workers=3, resume=True, **options).folder
    found, expected = hashes(folder), hashes(artifact)
    own = {"loftq_init/adapter_config.json", "loftq.json", "README.md"}  # they hold the name of the folder
    assert {name: h for name, h in found.items() if name not in own} == {
        name: h for name, h in expected.items() if name not in own
    }


def test_train_evaluate_generate_merge(artifact: Path, mixture: Path, tmp_path: Path, run: Run) -> None:
    """Oracle of the merge: the losses of the adapter on its backbone and of the dense model are equal."""
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(8)]
    data = str(tmp_path / "rows.jsonl")
    Path(data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    fast = {"max_steps": 3, "learning_rate": 1e-2, "batch_size": 4, "dtype": "float32", "cutoff_len": 64}
    planned = run("train", artifact, "--data", data, "--output", tmp_path / "t", "--dry-run", "--cpu")
    assert planned.exit_code == 0, planned.stderr
    trained = loftq.train(
        str(artifact), data=data, output=tmp_path / "trained", quiet=True, gradient_checkpointing=True, **fast
    )
    start, end = open_adapter(artifact / "loftq_init"), open_adapter(trained.folder)
    changed = [key for key in start.shapes if not torch.equal(start.read(key), end.read(key))]
    assert any("experts.base_layer.lora_B" in key for key in changed)
    assert len(changed) > len(start.shapes) / 2

    assert "mlp.experts.down_proj" in run("inspect", artifact).stdout
    for command in (("inspect", artifact), ("inspect", trained.folder), ("verify", artifact, "--source", mixture)):
        assert run(*command).exit_code == 0
    written = run("generate", artifact, "--adapter", trained.folder, "--prompt", "1 + 1", "--max-new-tokens", 2)
    assert written.exit_code == 0, written.stderr
    merged = loftq.merge(artifact, trained.folder, to="bf16", output=tmp_path / "merged", quiet=True)
    packed = loftq.load_qlora(artifact, trained.folder, dtype=torch.float32).eval()
    dense = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32)
    losses = [model(input_ids=TOKENS, labels=TOKENS).loss.item() for model in (packed, dense)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_loaded_backbone_can_be_saved(artifact: Path, tmp_path: Path) -> None:
    """Oracle: the tensors as they were loaded."""
    model = AutoModelForCausalLM.from_pretrained(artifact)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert any(isinstance(module, PackedExperts) for module in again.modules())
    for (name, tensor), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_moving_and_casting_keep_the_scales(artifact: Path) -> None:
    """Oracle: the weights before. A merge of the loaded model, and its undoing, work too."""
    model = loftq.load_qlora(artifact, dtype=torch.float32)
    experts = next(module for module in model.modules() if isinstance(module, PackedExperts))
    before = experts.dequantize("down_proj")
    assert torch.equal(model.bfloat16().half().float().get_base_model() and experts.dequantize("down_proj"), before)
    tokens = TOKENS[:, :4]
    expected = model.eval()(input_ids=tokens).logits
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=0.05, atol=0.05)
    model.unmerge_adapter()
    assert torch.equal(model(input_ids=tokens).logits, expected)


def _packed(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


def test_offloaded_experts_are_copied_once_a_pass(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracles: the model without offload, to the last bit, and the number of experts. A CPU runs the same code."""
    monkeypatch.setattr(expert_groups, "WEIGHTS_ON_CPU", 1)  # groups of one expert
    copied: list[list[int]] = []
    places: set[int] = set()
    copy = expert_moves._copy

    def noted(held: Any, group: Any, buffer: Any, streams: Any) -> Any:
        copied.append(group.experts)
        places.add(buffer["down_proj"][0].data_ptr())
        return copy(held, group, buffer, streams)

    monkeypatch.setattr(expert_moves, "_copy", noted)
    held, offloaded = (loftq.load_qlora(artifact, dtype=torch.float32, offload=o) for o in (None, "experts"))
    losses = []
    for model in (held, offloaded):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        losses.append(loss.item())
        if model is held:
            assert not copied
    assert losses[0] == losses[1]
    for (name, one), (_, other) in zip(held.named_parameters(), offloaded.named_parameters(), strict=True):
        assert one.grad is None or torch.equal(one.grad, other.grad), name
    passes = 2 * len(_packed(offloaded))  # forward and backward
    assert sorted(copied) == sorted([[expert] for expert in range(4)] * passes)
    assert len(places) <= expert_moves.BUFFERS * passes


def test_offloaded_experts_stay_in_main_memory(artifact: Path) -> None:
    """Oracle: the device of each tensor. The meta device stands for an accelerator."""
    model = loftq.load_qlora(artifact, device_map={"": "cpu"}, dtype=torch.float32, offload="experts")
    with pytest.raises(OptionError, match="load the model without offload"):
        model.merge_adapter()
    model.to("meta")
    kept = {id(tensor) for module in _packed(model) for tensor in module.packed_tensors().values()}
    tensors = [*model.parameters(), *model.buffers()]
    assert len(kept) == sum(tensor.device.type == "cpu" for tensor in tensors) > 0
    assert all(tensor.is_meta != (id(tensor) in kept) for tensor in tensors)
    assert {tensor.dtype for tensor in tensors if id(tensor) in kept} == {torch.uint8, torch.float16}


def test_training_and_answers_are_the_same_with_offloaded_experts(artifact: Path, tmp_path: Path, run: Run) -> None:
    """Oracle: the bytes of an adapter that was trained without, and its answer and perplexity."""
    data = tmp_path / "rows.txt"
    data.write_text("one two three four five six seven " * 40)
    options = {"task": "clm", "data": str(data), "max_steps": 2, "batch_size": 2, "cutoff_len": 32, "dtype": "float32"}
    folders = [
        loftq.train(str(artifact), output=tmp_path / name, offload=offload, quiet=True, **options).folder
        for name, offload in (("held", None), ("offloaded", "experts"))
    ]
    adapters = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
    assert adapters[0] == adapters[1]
    shown = []
    for offload in ((), ("--offload", "experts")):
        common = (artifact, "--adapter", folders[0], "--dtype", "float32", *offload)
        written = run("generate", *common, "--prompt", "one two", "--max-new-tokens", 3)
        measured = run("evaluate", *common, "--data", data, "--window", 32, "--quiet")
        assert written.exit_code == measured.exit_code == 0, written.stderr + measured.stderr
        shown.append((written.stdout, measured.stdout))
    assert shown[0] == shown[1]


def test_what_cannot_be_offloaded(artifact: Path, mixture: Path, pico: Path, tmp_path: Path, run: Run) -> None:
    data = tmp_path / "rows.txt"
    data.write_text("one two three four five six seven " * 9)
    train = ("--data", data, "--task", "clm", "--output", tmp_path / "out", "--offload", "experts")
    for options, message in (
        ((mixture, "--adapter", "lora"), "--adapter lora does not quantize experts"),
        ((pico,), "has no quantized experts: leave the option out"),
        ((pico, "--dry-run"), "has no quantized experts: leave the option out"),
    ):
        result = run("train", *options, *train)
        assert result.exit_code == 2
        assert message in result.stderr
        assert not (tmp_path / "out").exists()
    with pytest.raises(UnknownNameError, match="offload"):
        loftq.load_qlora(artifact, offload="attention")
    with pytest.raises(OptionError, match="expected one device"):
        loftq.load_qlora(artifact, device_map="auto", offload="experts")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_an_adapter_for_the_original(kind: str, tmp_path: Path) -> None:
    """Oracle: the dense difference of both adapters, and stock peft on the original, which computes it."""
    source = save_mixture(kind, tmp_path / "pico")
    folder = loftq.quantize(str(source), output=tmp_path / "out", **OPTIONS).folder
    model = loftq.load_qlora(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.03 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "trained")
    loftq.merge(folder, tmp_path / "trained", to="lora", output=tmp_path / "lora", quiet=True)
    merged, start = (
        AutoModelForCausalLM.from_pretrained(
            loftq.merge(folder, adapter, to="bf16", output=tmp_path / f"merged-{i}", quiet=True, check=False).folder,
            dtype=torch.float32,
        )
        for i, adapter in enumerate([tmp_path / "trained", None])
    )
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    before = {name: p.clone() for name, p in original.named_parameters()}
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # peft applies the patterns all the same
        adapted = PeftModel.from_pretrained(original, tmp_path / "lora").merge_and_unload()
    ends = dict(merged.named_parameters()), dict(start.named_parameters())
    for name, parameter in adapted.named_parameters():
        wanted = ends[0][name] - ends[1][name]
        torch.testing.assert_close(parameter - before[name], wanted, rtol=0.02, atol=0.004)
        assert "_proj" not in name or name.endswith("bias") or wanted.norm() > 0
    with pytest.raises(OptionError, match="has no place for"):
        loftq.merge(folder, tmp_path / "trained", to="mlx-lora", output=tmp_path / "mlx", quiet=True)
    loftq.merge(folder, tmp_path / "trained", to="lora", rank=3, output=tmp_path / "smaller", quiet=True)
    smaller = open_adapter(tmp_path / "smaller")
    assert {smaller.rank_of(module) for module in smaller.modules} == {3}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "nemotron_h", "deepseek_v3"])
def test_a_merge_has_the_names_of_checkpoints(kind: str, tmp_path: Path) -> None:
    """Oracle: the tensors that transformers saves of the merged model. Servers read no others."""
    source = save_mixture(kind, tmp_path / "pico")
    folder = loftq.quantize(str(source), output=tmp_path / "out", **OPTIONS).folder
    merged = loftq.merge(folder, to="bf16", output=tmp_path / "merged", quiet=True).folder
    AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    found, expected = (load_file(place / "model.safetensors") for place in (merged, tmp_path / "saved"))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name].to(tensor.dtype), tensor), name
