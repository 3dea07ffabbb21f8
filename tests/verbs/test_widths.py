"""Backbones of 2 and 3 bits, end to end: what is on disk, what is loaded, what the report says of both.

Covers: loftq/solving/allocate.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pico_llama, save_model
from grids import thinned
from oracles import read_gptq, read_int8, read_packed
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import loftq
from loftq.formats.artifact import open_artifact
from loftq.models.packed_linear import PackedLinear

TOKENS = torch.tensor([[11, 42, 7, 99, 3, 250, 17, 5]])


def make(pico: Path, out: Path, **options: Any) -> Path:
    return loftq.quantize(str(pico), output=out, **{"rank": 8, "iters": 3, "quiet": True, **options}).folder


NF = [{"bits": bits, "format": "loftq", "double_quant": double} for bits in (2, 3, 4) for double in (False, True)]
INT = [
    {"bits": bits, "quant_type": "int", "zero_point": zero, "group_size": group, "format": format}
    for bits, group in ((2, 32), (3, -1), (4, 64), (8, 32))
    for zero, format in (("symmetric", "loftq"), ("float", "loftq"), ("integer", "gptq"), ("symmetric", "gptq"))
]
OTHERS = [
    {"bits": 8, "format": "bitsandbytes"},
    {"bits": 3, "quant_type": "int", "double_quant": True, "format": "loftq"},
]


@pytest.mark.parametrize(
    "options",
    thinned(((case,) for case in NF + INT + OTHERS), lambda case: case not in INT or INT.index(case) % 5 in (0, 1, 3)),
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_files_hold_what_the_report_says(options: dict[str, Any], pico: Path, tmp_path: Path) -> None:
    """Oracle: numpy's reading of the files, peft's scaling, float64 norms."""
    folder = make(pico, tmp_path / "out", **options, alpha=16)
    source, tensors = load_file(pico / "model.safetensors"), load_file(folder / "model.safetensors")
    factors = load_file(folder / "loftq_init" / "adapter_model.safetensors")
    manifest = open_artifact(folder).manifest
    assert manifest["format"] == options["format"]
    assert len(manifest["layers"]) == 14
    stored = 0
    for row in manifest["layers"]:
        name = row["name"]
        own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        stored += sum(t.numel() * t.element_size() for t in own.values())
        weight = source[f"{name}.weight"].double()
        rounded = read_layer(own, options, weight.shape)
        b, a = (factors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "BA")
        assert float((weight - rounded - 2 * b @ a).norm() / weight.norm()) == pytest.approx(row["error"], rel=1e-5)
        assert row["error"] < row["plain_error"]
    assert manifest["totals"]["bits_per_weight"] == pytest.approx(8 * stored / manifest["totals"]["weights"])
    if options in NF:
        assert manifest["totals"]["bits_per_weight"] < options["bits"] + (0.17 if options["double_quant"] else 0.26)


def read_layer(own: dict[str, torch.Tensor], options: dict[str, Any], shape: Any) -> torch.Tensor:
    """The rounded weight of a module's tensors, by its format."""
    bits = int(options["bits"])
    if options["format"] == "gptq":
        return read_gptq(own, bits, shape)
    if options["format"] == "bitsandbytes":
        return read_int8(own)
    return read_packed(own, f"{options.get('quant_type', 'nf')}{bits}", options.get("group_size", 64), shape)


PLAIN: list[dict[str, Any]] = [
    {"bits": 2},
    {"bits": 3},
    {"bits": 2, "quant_type": "int"},
    {"bits": 3, "quant_type": "int", "format": "loftq"},
    {"bits": 3, "quant_type": "int", "zero_point": "float", "group_size": 32},
    {"bits": 8, "group_size": 128, "exclude_modules": ["[qkvo]_proj", "up_proj", "gate_proj"], "rank": 4},
]


@pytest.mark.parametrize(
    ("options", "sharded"),
    thinned(
        ((options, sharded) for options in PLAIN for sharded in (False, True)),
        lambda options, sharded: sharded == (PLAIN.index(options) % 2 == 1),
    ),
    ids=str,
)
def test_plain_loading_after_the_import(options: dict[str, Any], sharded: bool, pico: Path, tmp_path: Path) -> None:
    """Oracle: the files, whose float16 scales survive a load in bfloat16, and the source's outputs."""
    folder = make(pico, tmp_path / "out", **{"iters": 5, **options}, max_shard_size="40KB" if sharded else "5GB")
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == sharded
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cpu"})
    packed = {name: module for name, module in base.named_modules() if isinstance(module, PackedLinear)}
    assert len(packed) == len(open_artifact(folder).manifest["layers"])
    for name, module in packed.items():
        for key, tensor in module.state_dict().items():
            assert tensor.dtype == tensors[f"{name}.{key}"].dtype
            assert torch.equal(tensor, tensors[f"{name}.{key}"])
    base.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(reloaded(TOKENS).logits, base(TOKENS).logits)
    model = PeftModel.from_pretrained(base, folder, subfolder="loftq_init", is_trainable=True).eval()
    full = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted, adapted = full(TOKENS).logits.float(), model(TOKENS).logits.float()
        with model.disable_adapter():
            alone = model(TOKENS).logits.float()
    assert (adapted - wanted).norm() < (alone - wanted).norm()


@pytest.mark.parametrize("options", [{"bits": 2}, {"bits": 3, "quant_type": "int"}, {"bits": 8}], ids=str)
def test_load_qlora_trains_and_evaluates(options: dict[str, Any], pico: Path, tmp_path: Path) -> None:
    """Oracle: the gradients before an evaluation."""
    model = loftq.load_qlora(make(pico, tmp_path / "out", **options))

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


@pytest.mark.parametrize("options", [{"bits": 2}, {"bits": 3, "quant_type": "int"}], ids=["nf2", "gptq"])
def test_another_compute_dtype_leaves_the_weights(options: dict[str, Any], pico: Path, tmp_path: Path) -> None:
    """Oracle: the weights as they were loaded: scales in float16 are not scales in bfloat16."""
    folder = make(pico, tmp_path / "out", **options, compute_dtype="float16")
    models = [loftq.load_qlora(folder, dtype=dtype) for dtype in (None, torch.bfloat16)]
    ours, others = ([m for m in model.modules() if isinstance(m, PackedLinear)] for model in models)
    assert len(ours) == 14
    assert all(torch.equal(a.dequantize(), b.dequantize()) for a, b in zip(ours, others, strict=True))
    assert others[0].compute_dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [{"bits": 2}, {"bits": 3, "quant_type": "int"}], ids=["nf2", "gptq"])
def test_a_merged_model_is_dense_and_answers_the_same(
    options: dict[str, Any], dtype: torch.dtype, pico: Path, tmp_path: Path
) -> None:
    """Oracle: the logits before the merge."""
    model = loftq.load_qlora(make(pico, tmp_path / "out", **options), dtype=dtype, is_trainable=False).eval()
    with torch.no_grad():
        before = model(TOKENS).logits
        merged = model.merge_and_unload()
        after = merged(TOKENS).logits
    assert not any(isinstance(module, PackedLinear) for module in merged.modules())
    assert merged.model.layers[0].mlp.up_proj.weight.dtype == dtype
    assert (after - before).norm() < (0.02 if dtype == torch.bfloat16 else 1e-5) * before.norm()


def test_same_bytes_on_any_number_of_workers(pico: Path, tmp_path: Path) -> None:
    folders = [make(pico, tmp_path / str(workers), bits=3, workers=workers) for workers in (1, 3)]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bits", "2", "--format", "bitsandbytes"], ["--format bitsandbytes holds nf4", "not nf2", "--format loftq"]),
        (["--bits", "4", "--format", "gguf"], ["unknown format 'gguf'", "bitsandbytes-fsdp, gptq, loftq"]),
        (["--bits", "2", "--block-size", "48"], ["--format loftq", "block size 48", "use one of 8, 16, 32, 64"]),
        (["--bits", "2", "--block-size", "4096"], ["--block-size 4096", "q_proj", "use --block-size 64"]),
    ],
)
def test_bad_input(options: list[str], said: list[str], pico: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    ended = run("quantize", pico, *options, "--rank", 4, "--output", tmp_path / "out")
    assert ended.exit_code == 2
    assert all(part in ended.stderr for part in said), ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("bits", "advice"), [(4, "--exclude-modules q_proj"), (2, "use --block-size 16")])
def test_the_block_size_advised_is_one_of_the_format(
    bits: int, advice: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    """80 inputs: 16 divides them, which our own layout has and bitsandbytes has not."""
    sizes = {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 5}
    source = save_model(pico_llama(**sizes), tmp_path / "odd")
    ended = run("quantize", source, "--bits", bits, "--rank", 4, "--output", tmp_path / "out")
    assert ended.exit_code == 2
    assert advice in ended.stderr


def test_the_folder_is_named_after_its_bits(pico: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    ended = run("quantize", pico, "--bits", 2, "--rank", 4, "--save-dir", tmp_path, "--quiet")
    assert ended.exit_code == 0
    assert (tmp_path / "pico-llama-2bit-4rank" / "loftq.json").is_file()
    assert "import loftq" in (tmp_path / "pico-llama-2bit-4rank" / "README.md").read_text()


@pytest.mark.parametrize(
    ("allocation", "bits", "kind"),
    [
        ("first", 2.5, "nf"),
        ("auto", 2.7, "nf"),
        ("first", 3, "nf"),
        ("auto", 3.2, "nf"),
        (None, 2.25, "nf"),
        ("auto", 3.2, "int"),
        (None, 5.5, "int"),
    ],
)
def test_mixed_widths_in_one_folder(allocation: str | None, bits: float, kind: str, pico: Path, tmp_path: Path) -> None:
    """Oracle: numpy's reading of the files by the codebook that the report names, and the budget."""
    extra = {"quant_type": "int", "zero_point": "float"} if kind == "int" else {}
    folder = make(pico, tmp_path / "out", bits=bits, allocation=allocation, **extra)
    source, tensors = load_file(pico / "model.safetensors"), load_file(folder / "model.safetensors")
    manifest = open_artifact(folder).manifest
    rows = manifest["layers"]
    widths = [int(row["codebook"][-1]) for row in rows]
    counts = [row["shape"][0] * row["shape"][1] for row in rows]
    assert len(set(widths)) > 1
    mean = sum(n * b for n, b in zip(counts, widths, strict=True)) / sum(counts)
    assert bits - 0.35 < mean <= bits
    assert manifest["totals"]["bits_per_weight"] == pytest.approx(mean + (0.5 if extra else 0.25))
    if allocation == "first":
        assert widths == sorted(widths, reverse=True)
        assert set(widths) == {2, 4}
    else:
        assert manifest["recipe"]["allocation"] == "auto"
    model = loftq.load_qlora(folder)
    for row in rows:
        own = {k.removeprefix(f"{row['name']}."): t for k, t in tensors.items() if k.startswith(f"{row['name']}.")}
        weight = source[f"{row['name']}.weight"].double()
        rounded = read_packed(own, row["codebook"], 64, weight.shape)
        layer = model.base_model.model.get_submodule(row["name"])
        assert layer.base_layer.grid.codebook == row["codebook"]
        torch.testing.assert_close(layer.base_layer.dequantize(), rounded.float(), rtol=1e-6, atol=1e-8)
        factors = layer.lora_B["default"].weight.detach().double() @ layer.lora_A["default"].weight.detach().double()
        assert float((weight - rounded - factors).norm() / weight.norm()) == pytest.approx(row["error"], rel=1e-5)


def test_auto_leaves_less_than_first(pico: Path, tmp_path: Path) -> None:
    errors = {
        allocation: open_artifact(make(pico, tmp_path / allocation, bits=2.5, allocation=allocation)).manifest["totals"]
        for allocation in ("first", "auto")
    }
    assert errors["auto"]["error"] < errors["first"]["error"]


def test_a_budget_in_name_plan_and_resume(pico: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    options = ["--bits", "2.5", "--rank", 4, "--iter", 1, "--save-dir", tmp_path]
    planned = run("quantize", pico, *options, "--dry-run").stdout
    assert "pico-llama-2.5bit-4rank" in planned
    assert "nf4, 4.250 bits" in planned
    assert run("quantize", pico, *options, "--quiet").exit_code == 0
    folder = tmp_path / "pico-llama-2.5bit-4rank"
    before = {file.name: file.read_bytes() for file in folder.glob("*.*")}
    assert run("quantize", pico, *options, "--quiet", "--overwrite", "--workers", 3).exit_code == 0
    assert {file.name: file.read_bytes() for file in folder.glob("*.*")} == before
    assert run("quantize", pico, *options, "--quiet", "--resume").exit_code == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bits", "1.5"], ["--bits 1.5", "choose 2, 3, 4, or a budget between them"]),
        (["--bits", "4.5", "--quant-type", "nf"], ["--bits 4.5", "or a budget between them"]),
        (["--bits", "8.5"], ["--bits 8.5", "choose 2, 3, 4, 8, or a budget between them"]),
        (["--bits", "5", "--allocation", "first"], ["--bits 5", "choose 2, 4, or a budget between them"]),
        (["--bits", "3.5", "--quant-type", "int", "--format", "gptq"], ["one width a folder", "--format loftq"]),
        (["--bits", "2.5", "--allocation", "last"], ["unknown allocation 'last'", "auto, first, sensitive"]),
        (["--bits", "2.5", "--format", "bitsandbytes"], ["--format bitsandbytes holds nf4"]),
    ],
)
def test_bad_budgets(options: list[str], said: list[str], pico: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    ended = run("quantize", pico, *options, "--rank", 4, "--output", tmp_path / "out")
    assert ended.exit_code == 2
    assert all(part in ended.stderr for part in said), ended.stderr


@pytest.mark.parametrize("allocation", ["auto", "first"])
def test_a_plan_says_if_its_widths_are_yet_to_be_measured(allocation: str, pico: Path) -> None:
    report = loftq.quantize(str(pico), bits=2.5, rank=4, allocation=allocation, dry_run=True)
    told = [note for note in report.notes if "the run measures which layers get more bits" in note]
    assert len(told) == (allocation == "auto")
