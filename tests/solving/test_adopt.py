"""Folders of the original LoftQ script, made by its own procedure: peft's initialization, then 16-bit weights.

Oracles: bitsandbytes' dequantization of the files, bit for bit, and stock peft on the weights of the old folder.

Covers: loftq/core/recovered.py, loftq/planning/old_start.py.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from conftest import Result, byte_tokenizer, pico_llama
from hub import Hub, client_of, serve
from peft import PeftModel
from picos import pico_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import loftq
from loftq.core.recovered import recover
from loftq.errors import ArtifactError, OptionError, SourceError

Run = Callable[..., Result]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj")
TOKENS = torch.tensor([[11, 42, 7, 99, 3, 250, 17, 5, 64, 128]])


def fake_quantized(weight: torch.Tensor, rank: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the original script makes of a weight: Q in the weight's dtype, and factors for a scaling of 1."""
    exact, left = weight.float(), weight.float()
    for _ in range(iterations):
        codes, state = bnb.quantize_4bit(left.contiguous(), blocksize=64, quant_type="nf4")
        q = bnb.dequantize_4bit(codes, state)
        u, s, vh = torch.linalg.svd(exact - q, full_matrices=False)
        b, a = u[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt().unsqueeze(1) * vh[:rank]
        left = exact - b @ a
    return q.to(weight.dtype), a.contiguous(), b.contiguous()


def write_old(
    folder: Path,
    *,
    rank: int = 8,
    alpha: float = 2,
    iterations: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    model: PreTrainedModel | None = None,
    targets: tuple[str, ...] = TARGETS,
) -> Path:
    """A folder as `quantize_save.py` leaves it, of the pico llama or another model."""
    model = (model or pico_llama()).to(dtype)
    factors = {}
    for name, module in model.named_modules():
        if name.endswith(targets):
            q, a, b = fake_quantized(module.weight.data, rank, iterations)
            module.weight.data = q
            factors[f"base_model.model.{name}.lora_A.weight"], factors[f"base_model.model.{name}.lora_B.weight"] = a, b
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    adapter = folder / "loftq_init"
    adapter.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": str(folder), "r": rank,
        "lora_alpha": alpha, "lora_dropout": 0.1, "target_modules": list(targets), "bias": "none",
        "init_lora_weights": True, "inference_mode": True,
        "loftq_config": {},
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_old(tmp_path_factory.mktemp("old") / "pico-4bit-8rank")


def decoded(folder: Path, module: str, dtype: torch.dtype) -> torch.Tensor:
    """A weight as bitsandbytes reads it."""
    tensors = load_file(folder / "model.safetensors")
    state = bnb.QuantState.from_dict(
        {name.removeprefix(f"{module}.weight."): tensor for name, tensor in tensors.items()
         if name.startswith(f"{module}.weight.")}, device=torch.device("cpu"),
    )  # fmt: skip
    return bnb.dequantize_4bit(tensors[f"{module}.weight"], state).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("iterations", [1, 5])
def test_the_weights_are_the_same_to_the_bit(dtype: torch.dtype, iterations: int, tmp_path: Path) -> None:
    folder = write_old(tmp_path / "old", iterations=iterations, dtype=dtype)
    made = loftq.quantize(str(folder), output=tmp_path / "made").folder
    before, after = load_file(folder / "model.safetensors"), load_file(made / "model.safetensors")
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        same = decoded(made, module, dtype) if module.endswith(TARGETS) else after[name]
        assert same.dtype == dtype
        assert torch.equal(same, tensor), name
    assert after["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    factors = [load_file(place / "loftq_init" / "adapter_model.safetensors") for place in (folder, made)]
    assert factors[0].keys() == factors[1].keys()
    assert all(torch.equal(factors[0][name], factors[1][name]) for name in factors[0])


def test_an_encoder_decoder(tmp_path: Path) -> None:
    """BART, which the original script quantizes in float32."""
    targets = ("q_proj", "k_proj", "v_proj", "fc1", "fc2", "out_proj")
    bart = pico_model("bart", "seq2seq-lm")
    folder = write_old(tmp_path / "old", model=bart, targets=targets, dtype=torch.float32)
    made = loftq.quantize(str(folder), output=tmp_path / "made").folder
    before = load_file(folder / "model.safetensors")
    names = [name for name in before if name.removesuffix(".weight").endswith(targets) and name.endswith(".weight")]
    assert len(names) == 2 * (6 + 10)
    for name in names:
        assert torch.equal(decoded(made, name.removesuffix(".weight"), torch.float32), before[name]), name
    assert loftq.verify(made, folder).sound


def test_a_format_with_narrow_scales_is_refused(tmp_path: Path) -> None:
    """Stock loaders of bitsandbytes leave Falcon's linears alone, and our own format rounds scales to 16 bits."""
    targets = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    folder = write_old(tmp_path / "old", model=pico_model("falcon", "causal-lm"), targets=targets)
    with pytest.raises(SourceError, match="cannot be adopted: the format loftq, which its linears need, has 16-bit"):
        loftq.quantize(str(folder), output=tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_it_answers_as_the_old_folder_does_with_stock_peft(tmp_path: Path, run: Run) -> None:
    old = write_old(tmp_path / "old", dtype=torch.float32)
    result = run("quantize", old, "--output", tmp_path / "made")
    assert result.exit_code == 0, result.stderr
    base = AutoModelForCausalLM.from_pretrained(old, dtype=torch.float32)
    with torch.no_grad():
        bare = base(input_ids=TOKENS).logits
        expected = PeftModel.from_pretrained(base, old, subfolder="loftq_init").eval()(input_ids=TOKENS).logits
        actual = loftq.load_qlora(tmp_path / "made", is_trainable=False).eval()(input_ids=TOKENS).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    assert (bare - expected).abs().max() > 1e-3
    config = json.loads((tmp_path / "made" / "loftq_init" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 2, 0.1)
    assert run("verify", tmp_path / "made", "--source", old).exit_code == 0
    assert run("inspect", tmp_path / "made").exit_code == 0
    again = run("quantize", old, "--output", tmp_path / "made", "--resume")
    assert again.exit_code == 0, again.stderr


def test_a_repository_is_adopted(old: Path, tmp_path: Path) -> None:
    local = loftq.quantize(str(old), output=tmp_path / "local").folder
    with serve(Hub()) as hub, client_of(hub.endpoint, tmp_path / "hf"):
        hub.add("LoftQ/pico-4bit-8rank", old)
        made = loftq.quantize("LoftQ/pico-4bit-8rank", output=tmp_path / "made").folder
    for name in ("model.safetensors", "loftq_init/adapter_model.safetensors"):
        assert (made / name).read_bytes() == (local / name).read_bytes()


def test_its_adapter_is_not_left_out_without_a_word(old: Path, run: Run) -> None:
    words = ("--prompt", "Why?", "--max-new-tokens", 2)
    bare = run("generate", old, *words)
    assert f"{old} has an adapter in loftq_init, which is not used: `loftq quantize {old}`" in bare.stderr
    assert "is not used" not in run("generate", old, "--adapter", old / "loftq_init", *words).stderr


def test_a_forgotten_scaling_is_reported(old: Path, pico: Path, tmp_path: Path) -> None:
    """With the original model, the figures are those of the matrices in float64."""

    def note(**options: object) -> str:
        return loftq.quantize(str(old), output=tmp_path / "made", overwrite=True, **options).notes[-1]  # type: ignore[arg-type]

    forgotten = "the scaling of the adapter is 0.25, but its factors were computed for 1"
    assert note().startswith(forgotten)
    measured = note(source=str(pico))
    assert measured.startswith(forgotten)
    assert "--alpha 8" in measured
    found = [float(word) for word in re.findall(r"0\.\d{5}", measured)]
    assert found == pytest.approx([relative_error(old, pico, scaling) for scaling in (0, 0.25, 1)], abs=1e-5)
    right = note(source=str(pico), alpha=8)
    assert right.startswith("the scaling of the adapter, 1, is the one that its factors were computed for")


def relative_error(old: Path, source: Path, scaling: float) -> float:
    """‖W − Q − s·B·A‖ over ‖W‖, of all adapted linears together."""
    before, after = (load_file(folder / "model.safetensors") for folder in (source, old))
    factors = load_file(old / "loftq_init" / "adapter_model.safetensors")
    left = norm = 0.0
    for name in before:
        if name.removesuffix(".weight").endswith(TARGETS):
            stem = f"base_model.model.{name.removesuffix('weight')}lora_"
            added = scaling * factors[f"{stem}B.weight"].double() @ factors[f"{stem}A.weight"].double()
            left += float((before[name].double() - after[name].double() - added).square().sum())
            norm += float(before[name].double().square().sum())
    return (left / norm) ** 0.5


def test_a_folded_scaling_is_recognized(tmp_path: Path, old: Path) -> None:
    folder = Path(shutil.copytree(old, tmp_path / "folded"))
    path = folder / "loftq_init" / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)  # 0.25 · 2A · 2B = A · B
    notes = loftq.quantize(str(folder), output=tmp_path / "made").notes
    assert notes[-1].startswith("the scaling of the adapter, 0.25, is the one that its factors were computed for")


def test_training_adopts_it(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = ({"prompt": f"What is {i}+{i}?", "response": f"It is {2 * i}."} for i in range(12))
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for output in ("one", "two"):
        loftq.train(str(old), data="sums.jsonl", output=output, max_steps=1)
    (made,) = (tmp_path / "model_zoo" / "loftq").iterdir()
    assert json.loads((made / "loftq.json").read_text())["recipe"]["rank"] == 8
    with pytest.raises(OptionError, match=r"--rank 4: .* is quantized already, by the original LoftQ script"):
        loftq.train(str(old), data="sums.jsonl", output="three", max_steps=1, rank=4)


def test_what_is_not_such_a_folder(old: Path, pico: Path, tmp_path: Path, run: Run) -> None:
    with pytest.raises(ArtifactError, match=r"`loftq quantize .*` makes a loftq folder of it and keeps its adapter"):
        loftq.load_qlora(old)
    mixed = Path(shutil.copytree(pico, tmp_path / "mixed"))
    shutil.copytree(old / "loftq_init", mixed / "loftq_init")
    with pytest.raises(SourceError, match=r"self_attn.[kqv]_proj.weight does not lie on NF4 in blocks of 64"):
        loftq.quantize(str(mixed), output=tmp_path / "made")
    assert not (tmp_path / "made").exists()
    pickled = Path(shutil.copytree(old, tmp_path / "pickled"))
    weights = pickled / "loftq_init" / "adapter_model.safetensors"
    weights.rename(weights.with_name("adapter_model.bin"))
    with pytest.raises(SourceError, match=r"has no adapter_model.safetensors: the adapter was saved with pickle"):
        loftq.quantize(str(pickled), output=tmp_path / "made")
    fewer = Path(shutil.copytree(old, tmp_path / "fewer"))
    path = fewer / "loftq_init" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "layers.1.mlp.up" not in name}, path)
    with pytest.raises(SourceError, match=r"has no factors for 'model.layers.1.mlp.up_proj'"):
        loftq.quantize(str(fewer), output=tmp_path / "made")
    for options, message in {
        ("--rank", "4"): "--rank 4: ",
        ("--calibration", "default"): "--calibration default: ",
        ("--bits", "2"): "--bits 2: ",
    }.items():
        refused = run("quantize", old, *options, "--output", tmp_path / "made")
        assert refused.exit_code == 2
        assert message in refused.stderr
        assert "its adapter in loftq_init is kept" in refused.stderr
    refused = run("quantize", pico, "--source", pico, "--output", tmp_path / "made")
    assert refused.exit_code == 2
    assert "is not a folder of the original LoftQ script" in refused.stderr
    planned = run("quantize", old, "--dry-run", "--output", tmp_path / "made")
    assert planned.exit_code == 0
    assert "rank 8" in planned.stdout
    assert "adopted from the original LoftQ script" in planned.stdout
    assert not (tmp_path / "made" / "loftq.json").exists()


def test_values_off_the_codebook() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 128, generator=generator)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    lying = bnb.dequantize_4bit(codes, state).bfloat16()
    assert recover(lying, "nf4", 64) is not None
    moved = lying.clone()
    place = int(moved.view(-1)[:64].abs().argmin())
    moved.view(-1)[place] += moved.view(-1)[:64].abs().max() / 16
    assert recover(moved, "nf4", 64) is None
    assert recover(weight.bfloat16(), "nf4", 64) is None
    empty = recover(torch.zeros(2, 64, dtype=torch.bfloat16), "nf4", 64)
    assert empty is not None
    assert not empty[1].values.any()
