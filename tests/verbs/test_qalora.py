"""QA-LoRA folders: what is on disk, how they load and train, and whose checkpoints load beside them.

Covers: loftq/models/gptq_linear.py, loftq/models/gptq_quantizer.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pico_llama, save_model
from oracles import read_gptq, read_packed
from peft import PeftModel
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import loftq
from loftq.formats.artifact import open_artifact
from loftq.models.gptq_linear import GptqLinear
from loftq.models.packed_linear import PackedLinear

TOKENS = torch.tensor([[11, 42, 7, 99, 3, 250, 17, 5]])
OPTIONS: dict[str, Any] = {"adapter": "qalora", "group_size": 16, "rank": 2, "iters": 3, "alpha": 4, "quiet": True}


def make(pico: Path, out: Path, **options: Any) -> Path:
    return loftq.quantize(str(pico), output=out, **{**OPTIONS, **options}).folder


def train(model: Any, steps: int = 5, rate: float = 0.05) -> list[float]:
    """Losses of a few steps on one sequence."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("format", "extra"),
    [("loftq", {}), ("loftq", {"pool_size": 32}), ("gptq", {}), ("loftq", {"zero_point": "symmetric"})],
)
def test_files_hold_what_the_report_says(
    bits: int, format: str, extra: dict[str, Any], pico: Path, tmp_path: Path
) -> None:
    """Oracle: numpy's reading of the files, the adapter spread by peft's convention, float64 norms."""
    folder = make(pico, tmp_path / "out", bits=bits, format=format, **extra)
    source, tensors = load_file(pico / "model.safetensors"), load_file(folder / "model.safetensors")
    factors = load_file(folder / "loftq_init" / "adapter_model.safetensors")
    config = json.loads((folder / "loftq_init" / "adapter_config.json").read_text())
    pool = extra.get("pool_size", 16)
    assert (config["use_qalora"], config["qalora_group_size"]) == (True, pool)
    manifest = open_artifact(folder).manifest
    assert (manifest["kind"], manifest["format"]) == ("qalora", format)
    for row in manifest["layers"]:
        name = row["name"]
        own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        weight = source[f"{name}.weight"].double()
        rounded = (
            read_gptq(own, bits, weight.shape) if format == "gptq" else read_packed(own, f"int{bits}", 16, weight.shape)
        )
        b, a = (factors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "BA")
        pools = weight.shape[1] // pool
        assert a.shape == (2, pools)
        delta = (2 * pools / pool * b @ a).repeat_interleave(pool, dim=1)
        assert float((weight - rounded - delta).norm() / weight.norm()) == pytest.approx(row["error"], rel=1e-4)
        assert row["error"] <= row["refit_error"] < row["plain_error"]
    sums = manifest["totals"]
    assert sums["error"] <= sums["refit_error"] < sums["plain_error"]


@pytest.mark.parametrize("format", ["loftq", "gptq"])
def test_it_loads_trains_and_comes_back(format: str, pico: Path, tmp_path: Path) -> None:
    """Oracles: the loss, the logits before saving, and a plain load of the same two folders."""
    folder = make(pico, tmp_path / "out", bits=3, format=format)
    model = loftq.load_qalora(folder)
    losses = train(model)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        wanted = model(TOKENS).logits
    model.save_pretrained(tmp_path / "trained")
    again = loftq.load_qalora(folder, tmp_path / "trained")
    with torch.no_grad():
        assert torch.equal(again.eval()(TOKENS).logits, wanted)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    plain = PeftModel.from_pretrained(base, tmp_path / "trained").eval()
    with torch.no_grad():
        assert (plain(TOKENS).logits - wanted).norm() < 0.03 * wanted.norm()  # norms in bfloat16


def test_our_forward_is_pefts(pico: Path, tmp_path: Path) -> None:
    """Oracle: peft's own QALoraLinearVariant on the same weights, and the dense weight that its convention means, in
    float64.
    """
    model = loftq.load_qalora(make(pico, tmp_path / "out", bits=4), dtype=torch.float32, is_trainable=False)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    layer.lora_A.double()
    layer.lora_B.double()
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        base = layer.base_layer(x)
        theirs = QALoraLinearVariant.forward(layer, active_adapter="default", x=x, result=base)
        assert torch.equal(layer(x), theirs)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        delta = (2 * 8 / 16 * b @ a).repeat_interleave(16, dim=1)
        wanted = x @ (layer.base_layer.dequantize(torch.float64) + delta).T
        assert float((layer(x) - wanted).abs().max()) < 1e-10


def test_a_dense_merge_and_back(pico: Path, tmp_path: Path) -> None:
    """Oracle: the logits before."""
    model = loftq.load_qalora(make(pico, tmp_path / "out", bits=3), dtype=torch.float32)
    train(model)
    with torch.no_grad():
        before = model(TOKENS).logits
        for safe in (False, True):
            model.merge_adapter(safe_merge=safe)
            assert (model(TOKENS).logits - before).norm() < 1e-5 * before.norm()
            model.unmerge_adapter()
            assert torch.equal(model(TOKENS).logits, before)
        merged = model.merge_and_unload()
        assert (merged(TOKENS).logits - before).norm() < 1e-5 * before.norm()
    assert not any(isinstance(module, PackedLinear) for module in merged.modules())


def foreign(folder: Path, out: Path, *, version: int = 2, act_order: bool = False) -> dict[str, torch.Tensor]:
    """A GPTQ checkpoint as others write it, from one of ours; the dense weights that it stands for."""
    import shutil

    shutil.copytree(folder, out)
    (out / "loftq.json").unlink()
    shutil.rmtree(out / "loftq_init")
    config = json.loads((out / "config.json").read_text())
    entry = config["quantization_config"]
    for key in ("modules_in_block_to_quantize", "block_name_to_quantize", "checkpoint_format", "meta"):
        del entry[key]
    if version == 2:
        entry["checkpoint_format"] = "gptq_v2"
    entry["desc_act"] = act_order
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(out / "model.safetensors")
    dense = {}
    for key in [key for key in tensors if key.endswith(".qweight")]:
        module = key.removesuffix(".qweight")
        own = {k.removeprefix(f"{module}."): t for k, t in tensors.items() if k.startswith(f"{module}.")}
        if act_order:
            order = torch.randperm(len(own["g_idx"]), generator=torch.Generator().manual_seed(0))
            own["g_idx"] = own["g_idx"][order].contiguous()
        shape = (own["qweight"].shape[1], len(own["g_idx"]))
        dense[module] = read_gptq(own, 4, shape)
        if version == 1:
            zeros = own["qzeros"].view(torch.uint8)  # two zero-points a byte, each written less one
            assert bool(((zeros & 15) > 0).all())
            assert bool(((zeros >> 4) > 0).all())
            own["qzeros"] = (zeros - 0x11).view(torch.int32)
        tensors |= {f"{module}.{k}": t for k, t in own.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return dense


@pytest.mark.parametrize(("version", "act_order"), [(2, False), (1, False), (2, True), (1, True)])
def test_anyones_gptq_checkpoint(version: int, act_order: bool, tmp_path: Path) -> None:
    """Oracle: numpy's reading of the checkpoint by its group indices. A new adapter adds nothing, and trains."""
    source = save_model(pico_llama(), tmp_path / "source")
    zero = "symmetric" if version == 1 else "integer"  # version 1 has no place for a zero-point of zero
    kind = {"adapter": "lora", "quant_type": "int", "zero_point": zero}
    ours = make(source, tmp_path / "ours", bits=4, format="gptq", **kind)
    dense = foreign(ours, tmp_path / "theirs", version=version, act_order=act_order)
    model = loftq.load_qalora(tmp_path / "theirs", rank=2, dtype=torch.float32)
    base = model.base_model.model
    layers = {name: module for name, module in base.named_modules() if hasattr(module, "lora_A")}
    assert sorted(layers) == sorted(dense)
    for name, layer in layers.items():
        assert isinstance(layer.base_layer, GptqLinear)
        torch.testing.assert_close(layer.base_layer.dequantize().double(), dense[name], rtol=1e-6, atol=1e-7)
        assert layer.qalora_group_size["default"] == 16
    with torch.no_grad():
        alone = base(TOKENS).logits
        with model.disable_adapter():
            assert torch.equal(model(TOKENS).logits, alone)
    losses = train(model)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "trained")
    again = loftq.load_qalora(tmp_path / "theirs", tmp_path / "trained", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--pool-size", 24], ["--pool-size 24", "multiple of the group size, 16"]),
        (["--pool-size", 8], ["--pool-size 8", "multiple of the group size, 16"]),
        (["--pool-size", 96], ["--pool-size 96 does not divide the 64 inputs", "--pool-size 16"]),
        (["--rank", 16], ["--rank 16", "64 x 4, pooled by 16", "at most 4"]),
        (["--group-size", -1], ["--group-size -1", "use 32, 64 or 128"]),
        (["--adapter", "qlora"], ["unknown adapter 'qlora'", "lora, qalora"]),
        (["--adapter", "lora", "--pool-size", 16], ["--pool-size 16: applies only to --adapter qalora"]),
    ],
)
def test_bad_input(options: list[Any], said: list[str], pico: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    given = ["--adapter", "qalora", "--group-size", 16, "--rank", 2]
    ended = run("quantize", pico, "--quant-type", "int", *given, *options, "--output", tmp_path / "out")
    assert ended.exit_code == 2
    assert all(part in ended.stderr for part in said), ended.stderr
    assert not (tmp_path / "out").exists()


def test_codebooks_have_no_zero_points(pico: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    ended = run("quantize", pico, "--adapter", "qalora", "--quant-type", "nf", "--output", tmp_path / "out")
    assert ended.exit_code == 2
    assert "--quant-type nf: QA-LoRA merges into zero-points, which only int has" in ended.stderr


def test_the_other_loader_is_named(pico: Path, tmp_path: Path) -> None:
    pooled, plain = make(pico, tmp_path / "pooled"), make(pico, tmp_path / "plain", adapter="lora", quant_type="int")
    with pytest.raises(loftq.LoftQError, match="qalora artifact: load it with load_qalora"):
        loftq.load_qlora(pooled)
    with pytest.raises(loftq.LoftQError, match="qlora artifact: load it with load_qlora"):
        loftq.load_qalora(plain)
    with pytest.raises(loftq.LoftQError, match=r"plain LoRA adapter: .* takes a QA-LoRA \(pools of 16\) adapter"):
        loftq.load_qalora(pooled, plain / "loftq_init")
    with pytest.raises(loftq.LoftQError, match="unknown backend 'cuda'"):
        loftq.load_qalora(pooled, backend="cuda")
    with pytest.raises(loftq.LoftQError, match="pip install gptqmodel optimum"):
        loftq.load_qalora(pooled, backend="gptqmodel")
    with pytest.raises(loftq.LoftQError, match=r"no such folder: .*nowhere"):
        loftq.load_qalora(tmp_path / "nowhere")


def test_table_and_plan(pico: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    options = ["--adapter", "qalora", "--group-size", 16, "--rank", 2, "--bits", 3, "--output", tmp_path / "out"]
    assert "int3" in run("quantize", pico, *options, "--dry-run").stdout
    shown = run("quantize", pico, *options, "--quiet").stdout
    assert "error, refitted" in shown
    assert "load_qalora" in shown
    card = (tmp_path / "out" / "README.md").read_text()
    assert "QA-LoRA" in card
    assert "load_qalora" in card
