"""The verb: what lies in the folder, that it is what was asked for, and that it is the same every time.

Covers: loftq/artifacts/manifest.py, loftq/artifacts/rows.py, loftq/planning/plan.py, loftq/planning/planner.py,
loftq/solving/layers.py, loftq/solving/report.py.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from conftest import pico_llama, save_model
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import loftq
from loftq.core.blockwise import BlockQuantizer
from loftq.core.solvers.loftq import solve_loftq
from loftq.errors import OutputError
from loftq.formats.artifact import open_artifact
from loftq.models.loading import guard_cpu
from loftq.planning.recipe import layer_seed


def make(source: Path, output: Path, **options: Any) -> Path:
    return loftq.quantize(str(source), output=output, **{"rank": 4, "iters": 2, "quiet": True, **options}).folder


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_folder_holds_what_a_user_needs(pico: Path, tmp_path: Path) -> None:
    folder = make(pico, tmp_path / "out")
    assert set(hashes(folder)) == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "loftq.json",
        "loftq_init/adapter_config.json",
        "loftq_init/adapter_model.safetensors",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("Grüße").input_ids) == "Grüße"
    assert tokenizer.chat_template


def test_backbone_is_really_quantized(pico: Path, tmp_path: Path) -> None:
    """Oracle: the dtypes and bytes on disk."""
    folder = make(pico, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    weights = {name: t for name, t in tensors.items() if name.endswith("_proj.weight")}
    assert len(weights) == 14
    assert {t.dtype for t in weights.values()} == {torch.uint8}
    report = open_artifact(folder).manifest["totals"]
    stored = sum(t.numel() * t.element_size() for name, t in tensors.items() if "_proj.weight" in name)
    assert report["bits_per_weight"] == 8 * stored / report["weights"]
    assert report["backbone_bytes"] == (folder / "model.safetensors").stat().st_size
    assert report["adapter_bytes"] == (folder / "loftq_init" / "adapter_model.safetensors").stat().st_size


def test_manifest_describes_every_other_file(pico: Path, tmp_path: Path) -> None:
    folder = make(pico, tmp_path / "out")
    manifest = open_artifact(folder).manifest
    found = hashes(folder)
    del found["loftq.json"]
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == found
    assert manifest["recipe"]["rank"] == 4
    assert manifest["recipe"]["alpha"] == 4
    assert manifest["source"]["model"] == str(pico)
    assert {"torch", "transformers", "peft", "bitsandbytes", "loftq"} <= set(manifest["versions"])
    for row in manifest["layers"]:
        assert row["error"] == row["iterations"][row["kept_iteration"] - 1] < row["plain_error"]


def test_card_shows_the_settings_and_the_errors(pico: Path, tmp_path: Path) -> None:
    folder = make(pico, tmp_path / "out", alpha=8, double_quant=True)
    card = (folder / "README.md").read_text()
    totals = open_artifact(folder).manifest["totals"]
    for wanted in (
        f"{totals['error']:.5f}",
        f"{totals['plain_error']:.5f}",
        "bnb_4bit_use_double_quant=True",
        'subfolder="loftq_init"',
        "support_avx512bf16_for_cpu",
        "| rank, alpha | 4, 8 |",
    ):
        assert wanted in card
    assert str(tmp_path) not in card


def test_shards_in_and_out_change_nothing_but_the_files(pico: Path, pico_sharded: Path, tmp_path: Path) -> None:
    """Oracle: the same tensors, whatever the split, and a stock load of several shards."""
    one = make(pico, tmp_path / "one")
    many = make(pico_sharded, tmp_path / "many", max_shard_size="30KB")
    index = json.loads((many / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    parts: dict[str, torch.Tensor] = {}
    for file in files:
        part = load_file(many / file)
        assert all(index["weight_map"][name] == file for name in part)
        parts |= part
    whole = load_file(one / "model.safetensors")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    first, second = (open_artifact(folder).manifest for folder in (one, many))
    assert first["source"]["sha256"] == second["source"]["sha256"]
    _, loading = AutoModelForCausalLM.from_pretrained(many, output_loading_info=True)
    assert not loading["missing_keys"]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float16", "float32"])
def test_stock_load_gives_the_codes_that_were_solved(
    pico: Path, tmp_path: Path, double_quant: bool, compute_dtype: str
) -> None:
    """Oracle: bitsandbytes' own dequantization of the loaded layer, bit for bit."""
    folder = make(pico, tmp_path / "out", double_quant=double_quant, compute_dtype=compute_dtype, iters=0)
    dtype = getattr(torch, compute_dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    layer = model.model.layers[1].mlp.down_proj
    weight = load_file(pico / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].float()
    quantizer = BlockQuantizer("nf4", double_quant=double_quant)
    codes, scales = quantizer.quantize(weight)
    loaded = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert layer.compute_dtype == loaded.dtype == dtype
    assert torch.equal(loaded, quantizer.decode(codes, scales, weight.shape).to(dtype))
    assert {p.dtype for name, p in model.named_parameters() if "norm" in name or "embed" in name} == {dtype}


@pytest.mark.parametrize(
    ("options", "scaling"),
    [({}, 1.0), ({"alpha": 8}, 2.0), ({"alpha": 1}, 0.25), ({"alpha": 8, "rslora": True}, 4.0)],
)
def test_scaling_is_folded_into_the_factors(
    pico: Path, tmp_path: Path, options: dict[str, Any], scaling: float
) -> None:
    """Oracle: peft's own scaling; the effective weight does not depend on it."""
    folder = make(pico, tmp_path / "out", **options)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), folder, subfolder="loftq_init")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == scaling
    weight = load_file(pico / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].float()
    name = "model.layers.0.self_attn.q_proj"
    plain = solve_loftq(weight, BlockQuantizer("nf4"), 4, 2, 1.0, seed=layer_seed(0, name))
    effective = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(effective.detach(), plain.b @ plain.a, rtol=1e-4, atol=1e-6)


def test_no_iterations_is_qlora(pico: Path, tmp_path: Path) -> None:
    folder = make(pico, tmp_path / "out", iters=0)
    adapter = load_file(folder / "loftq_init" / "adapter_model.safetensors")
    assert all((tensor == 0).all() == (".lora_B." in name) for name, tensor in adapter.items())
    manifest = open_artifact(folder).manifest
    assert manifest["totals"]["error"] == manifest["totals"]["plain_error"]
    assert manifest["recipe"]["method"] == "qlora"
    assert "QLoRA's start (B = 0)" in (folder / "README.md").read_text()


def test_some_modules_only(pico: Path, tmp_path: Path) -> None:
    """What is left out stays in 16 bits, without an adapter, in a stock load as well."""
    folder = make(pico, tmp_path / "out", target_modules=["*_proj"], exclude_modules=["layers.0.*", "down_proj"])
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.1.mlp.down_proj.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.1.mlp.up_proj.weight"].dtype == torch.uint8
    base, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    model = PeftModel.from_pretrained(base, folder, subfolder="loftq_init")
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == 6
    assert all(".layers.1." in name for name in adapted)
    guard_cpu(base)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_exact_svd_is_no_worse_by_much(pico: Path, tmp_path: Path) -> None:
    """Oracle: the full SVD at every iteration."""
    fast = open_artifact(make(pico, tmp_path / "fast", iters=5)).manifest["totals"]["error"]
    exact = open_artifact(make(pico, tmp_path / "exact", iters=5, svd="exact")).manifest["totals"]["error"]
    assert fast <= exact * 1.002


def test_same_bytes_again(pico_sharded: Path, tmp_path: Path) -> None:
    """Oracle: the first run. Workers finish in another order; the random start is a seed's, not the clock's."""
    first = hashes(make(pico_sharded, tmp_path / "out", workers=1))
    for workers in (2, 5):
        assert hashes(make(pico_sharded, tmp_path / "out", workers=workers, overwrite=True)) == first
    drawn = [hashes(make(pico_sharded, tmp_path / "out", iters=0, seed=seed, overwrite=True)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    name = "loftq_init/adapter_model.safetensors"
    assert drawn[2][name] != drawn[0][name]


def test_threads_of_the_caller_do_not_matter_and_come_back(pico: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(hashes(make(pico, tmp_path / "out", overwrite=True)))
            assert torch.get_num_threads() == threads
        assert found[0] == found[1]
    finally:
        torch.set_num_threads(before)


def test_dry_run_plans_what_a_run_does(pico: Path, tmp_path: Path) -> None:
    """Oracle: the totals of the run itself. Nothing is written."""
    planned = loftq.quantize(str(pico), output=tmp_path / "out", rank=4, dry_run=True)
    assert not (tmp_path / "out").exists()
    assert planned.seconds is None
    done = open_artifact(make(pico, tmp_path / "out")).manifest["totals"]
    assert planned.totals.items() <= done.items()


def test_weights_that_nf4_holds_exactly_come_back(tmp_path: Path) -> None:
    """Oracle: the weights themselves."""
    model = pico_llama()
    quantizer = BlockQuantizer("nf4")
    for parameter in model.parameters():
        if parameter.dim() == 2:
            codes, scales = quantizer.quantize(parameter.data.float())
            parameter.data = quantizer.decode(codes, scales, parameter.shape)
    source = save_model(model.float(), tmp_path / "exact")
    folder = make(source, tmp_path / "out", compute_dtype="float32")
    assert open_artifact(folder).manifest["totals"]["error"] < 1e-6
    wanted = model(torch.tensor([[5, 6, 7]])).logits
    got = loftq.load_qlora(folder).eval()(torch.tensor([[5, 6, 7]])).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_dead_layer_does_no_harm(tmp_path: Path) -> None:
    """All-zero weights: no NaN, no division by nothing."""
    model = pico_llama()
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    folder = make(save_model(model, tmp_path / "dead"), tmp_path / "out")
    adapter = load_file(folder / "loftq_init" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in adapter.values())
    row = next(r for r in open_artifact(folder).manifest["layers"] if r["name"].endswith("0.mlp.up_proj"))
    assert row["error"] == row["plain_error"] == 0


def test_resuming_a_finished_folder_changes_nothing(pico: Path, tmp_path: Path) -> None:
    """Oracle: the files and the report of the run that finished it. Other settings are no reason to redo it."""
    done = loftq.quantize(str(pico), output=tmp_path / "out", rank=4, iters=2, quiet=True)
    before = {path: path.stat().st_mtime_ns for path in done.folder.rglob("*")}
    again = loftq.quantize(str(pico), output=tmp_path / "out", rank=4, iters=2, quiet=True, resume=True)
    assert (again.totals, again.layers) == (done.totals, done.layers)
    with pytest.raises(OutputError, match="finished, but its iters differs"):
        make(pico, tmp_path / "out", iters=3, resume=True)
    assert {path: path.stat().st_mtime_ns for path in done.folder.rglob("*")} == before
