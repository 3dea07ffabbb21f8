"""Backbones of 2 and 3 bits, end to end: what is on disk, what is loaded, what the report says of both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import read_packed
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import loftq
from loftq.formats.artifact import open_artifact
from loftq.models.packed_linear import PackedLinear

TOKENS = torch.tensor([[11, 42, 7, 99, 3, 250, 17, 5]])


def make(pico: Path, out: Path, **options: Any) -> Path:
    return loftq.quantize(str(pico), output=out, **{"rank": 8, "iters": 3, "quiet": True, **options}).folder


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("double", [False, True])
def test_files_hold_what_the_report_says(bits: int, double: bool, pico: Path, tmp_path: Path) -> None:
    """Oracle: numpy's reading of the files, peft's scaling, float64 norms."""
    folder = make(pico, tmp_path / "out", bits=bits, format="loftq", double_quant=double, alpha=16)
    source, tensors = load_file(pico / "model.safetensors"), load_file(folder / "model.safetensors")
    factors = load_file(folder / "loftq_init" / "adapter_model.safetensors")
    manifest = open_artifact(folder).manifest
    assert manifest["format"] == "loftq"
    assert len(manifest["layers"]) == 14
    stored = 0
    for row in manifest["layers"]:
        name = row["name"]
        own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        stored += sum(t.numel() * t.element_size() for t in own.values())
        weight = source[f"{name}.weight"].double()
        rounded = read_packed(own, f"nf{bits}", 64, weight.shape)
        b, a = (factors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "BA")
        assert float((weight - rounded - 2 * b @ a).norm() / weight.norm()) == pytest.approx(row["error"], rel=1e-5)
        assert row["error"] < row["plain_error"]
    assert manifest["totals"]["bits_per_weight"] == pytest.approx(8 * stored / manifest["totals"]["weights"])
    assert manifest["totals"]["bits_per_weight"] < bits + (0.26 if not double else 0.17)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("sharded", [False, True])
def test_plain_loading_after_the_import(bits: int, sharded: bool, pico: Path, tmp_path: Path) -> None:
    """Oracle: the files, whose float16 scales survive a load in bfloat16, and the source's outputs."""
    folder = make(pico, tmp_path / "out", bits=bits, iters=5, max_shard_size="40KB" if sharded else "5GB")
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == sharded
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cpu"})
    packed = {name: module for name, module in base.named_modules() if isinstance(module, PackedLinear)}
    assert len(packed) == 14
    for name, module in packed.items():
        for key, tensor in module.state_dict().items():
            assert tensor.dtype == tensors[f"{name}.{key}"].dtype
            assert torch.equal(tensor, tensors[f"{name}.{key}"])
    model = PeftModel.from_pretrained(base, folder, subfolder="loftq_init", is_trainable=True).eval()
    full = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted, adapted = full(TOKENS).logits.float(), model(TOKENS).logits.float()
        with model.disable_adapter():
            alone = model(TOKENS).logits.float()
    assert (adapted - wanted).norm() < (alone - wanted).norm()


def test_load_qlora_trains_and_evaluates(pico: Path, tmp_path: Path) -> None:
    """Oracle: the gradients before an evaluation."""
    model = loftq.load_qlora(make(pico, tmp_path / "out", bits=2))

    def gradients() -> dict[str, torch.Tensor]:
        model.train()
        model.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=TOKENS)
    after = gradients()
    assert before
    assert all(torch.equal(before[name], after[name]) for name in before)
    exact = loftq.load_qlora(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert exact.eval()(TOKENS).logits.dtype == torch.float32


def test_same_bytes_on_any_number_of_workers(pico: Path, tmp_path: Path) -> None:
    folders = [make(pico, tmp_path / str(workers), bits=3, workers=workers) for workers in (1, 3)]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bits", "2", "--format", "bitsandbytes"], ["--format bitsandbytes holds nf4, not nf2", "--format loftq"]),
        (["--bits", "4", "--format", "gguf"], ["unknown format 'gguf'", "bitsandbytes, loftq"]),
        (["--bits", "2", "--block-size", "48"], ["block size 48", "--format loftq has", "8, 16, 32, 64"]),
        (["--bits", "2", "--block-size", "4096"], ["--block-size 4096", "q_proj", "use --block-size 64"]),
    ],
)
def test_bad_input(options: list[str], said: list[str], pico: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    ended = run("quantize", pico, *options, "--rank", 4, "--output", tmp_path / "out")
    assert ended.exit_code == 2
    assert all(part in ended.stderr for part in said), ended.stderr
    assert not (tmp_path / "out").exists()


def test_the_folder_is_named_after_its_bits(pico: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    ended = run("quantize", pico, "--bits", 2, "--rank", 4, "--save-dir", tmp_path, "--quiet")
    assert ended.exit_code == 0
    assert (tmp_path / "pico-llama-2bit-4rank" / "loftq.json").is_file()
    assert "import loftq" in (tmp_path / "pico-llama-2bit-4rank" / "README.md").read_text()
