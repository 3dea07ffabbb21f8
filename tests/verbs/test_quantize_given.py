"""Adapters for backbones that other programs quantized, of a pico llama.

Oracles: SVD in float64 of W − Q, where Q is what the other library itself dequantizes; logits after a stock peft load.

Covers: loftq/planning/given_backbone.py, loftq/solving/given.py, loftq/core/solvers/given.py,
loftq/artifacts/given_card.py, loftq/artifacts/given_checks.py, loftq/verbs/quantize_given.py,
loftq/planning/given_gguf.py.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import gguf
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import Result, byte_tokenizer, pico_llama, save_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, CompressedTensorsConfig

import loftq
from loftq.errors import ArtifactError, OptionError, OutputError, SourceError
from loftq.models.loading import guard_cpu

Run = Callable[..., Result]
TOKENS = torch.tensor([[11, 42, 7, 99, 3, 250, 17, 5, 64, 128]])
TEXT = "The quick brown fox jumps over the lazy dog. " * 120


def save_bitsandbytes(source: Path, folder: Path, **options: Any) -> Path:
    """A quantization by transformers and bitsandbytes themselves."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **options)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_fp8(source: Path, folder: Path) -> Path:
    """The linears in float8, with a scale for each block of 32 x 32."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        blocks = tensors[name].float().unfold(0, 32, 32).unfold(1, 32, 32)  # (out / 32, in / 32, 32, 32)
        scales = blocks.abs().amax(dim=(2, 3)) / 448
        spread = scales.repeat_interleave(32, 0).repeat_interleave(32, 1)
        tensors[name] = (tensors[name].float() / spread).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    entry = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    return folder


@pytest.fixture(scope="module")
def backbones(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with backbones in it. Do not write to it."""
    here = tmp_path_factory.mktemp("backbones")
    save_bitsandbytes(pico, here / "nf4", bnb_4bit_quant_type="nf4")
    save_bitsandbytes(pico, here / "fp4", bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True)
    dense = pico_llama()
    for name, module in dense.named_modules():
        if name.endswith("_proj"):
            codes, state = bnb.quantize_4bit(module.weight.data, blocksize=64, quant_type="nf4")
            module.weight.data = bnb.dequantize_4bit(codes, state)
    save_model(dense, here / "dense")
    save_fp8(pico, here / "fp8")
    options: Any = {"bits": 4, "quant_type": "int", "format": "gptq", "group_size": 32, "rank": 1, "iters": 1}
    loftq.quantize(str(pico), output=here / "gptq", **options)
    start = loftq.quantize(str(pico), output=here / "int8", bits=8, rank=1, iters=0).folder
    loftq.merge(start, to="compressed-tensors", output=here / "integers", zero_point="integer", check=False, quiet=True)
    for made in (here / "gptq", here / "int8", here / "integers"):  # as others make them
        for name in ("loftq.json", "README.md"):
            (made / name).unlink()
        shutil.rmtree(made / "loftq_init", ignore_errors=True)
    return here


def source_weights(pico: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(pico / "model.safetensors")
    return {name.removesuffix(".weight"): w.double() for name, w in tensors.items() if name.endswith("_proj.weight")}


def bitsandbytes_weights(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return {
        name: bnb.dequantize_4bit(module.weight.data, module.weight.quant_state).double()
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }


def gptq_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The formula of the format, with the codes unpacked one by one."""
    tensors = load_file(folder / "model.safetensors")
    weights = {}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        words, zeros, scales = (tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))
        shifts = torch.arange(8, dtype=torch.int32) * 4
        codes = ((words.unsqueeze(1) >> shifts.view(1, -1, 1)) & 15).flatten(0, 1)  # (in, out)
        points = ((zeros.unsqueeze(2) >> shifts) & 15).flatten(1)  # (groups, out)
        group = tensors[f"{module}.g_idx"].long()
        weights[module] = ((codes - points[group]).double() * scales.double()[group]).t()
    return weights


def fp8_weights(folder: Path) -> dict[str, torch.Tensor]:
    """As transformers dequantizes them."""
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = {**config.quantization_config, "dequantize": True}
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.bfloat16)
    state = model.state_dict()
    return {n.removesuffix(".weight"): w.double() for n, w in state.items() if n.endswith("_proj.weight")}


def int8_weights(folder: Path) -> dict[str, torch.Tensor]:
    """As bitsandbytes dequantizes them, in the dtype of the model."""
    tensors = load_file(folder / "model.safetensors")
    modules = [name.removesuffix(".SCB") for name in tensors if name.endswith(".SCB")]
    weights = {m: bnb.int8_vectorwise_dequant(tensors[f"{m}.weight"], tensors[f"{m}.SCB"]) for m in modules}
    return {m: weight.bfloat16().double() for m, weight in weights.items()}


def compressed_weights(folder: Path) -> dict[str, torch.Tensor]:
    """As transformers decompresses them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about the options that are added to those of the folder
        config = CompressedTensorsConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    state = model.state_dict()
    return {n.removesuffix(".weight"): w.double() for n, w in state.items() if n.endswith("_proj.weight")}


READ = {
    "int8": int8_weights,
    "integers": compressed_weights,
    "fp8": fp8_weights,
    "nf4": bitsandbytes_weights,
    "fp4": bitsandbytes_weights,
    "gptq": gptq_weights,
    "dense": source_weights,
}


@pytest.mark.parametrize("kind", READ)
def test_the_factors_are_the_best_of_their_rank(kind: str, backbones: Path, pico: Path, tmp_path: Path) -> None:
    options: Any = {"rank": 8, "alpha": 16, "svd": "exact", "output": tmp_path / "out"}
    report = loftq.quantize(str(pico), backbone=backbones / kind, **options)
    factors = load_file(tmp_path / "out" / "loftq_init" / "adapter_model.safetensors")
    given, source = READ[kind](backbones / kind), source_weights(pico)
    assert {row["name"] for row in report.layers} == given.keys() == source.keys()
    for row in report.layers:
        name = row["name"]
        residual = source[name] - given[name]
        u, s, vh = torch.linalg.svd(residual, full_matrices=False)
        best = u[:, :8] * s[:8] @ vh[:8]
        a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        assert (2 * b @ a - best).norm() < 1e-3 * best.norm()
        assert row["plain_error"] == pytest.approx(float(residual.norm() / source[name].norm()), rel=1e-3)
        assert row["error"] == pytest.approx(float((residual - best).norm() / source[name].norm()), rel=1e-3)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_stock_peft_comes_nearer_to_the_source(kind: str, backbones: Path, pico: Path, tmp_path: Path) -> None:
    loftq.quantize(str(pico), backbone=str(backbones / kind), rank=16, output=tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(backbones / kind, dtype=torch.bfloat16)
    guard_cpu(base)
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.bfloat16)(input_ids=TOKENS).logits.float()
        before = base(input_ids=TOKENS).logits.float()
        adapted = PeftModel.from_pretrained(base, tmp_path / "out", subfolder="loftq_init").eval()
        after = adapted(input_ids=TOKENS).logits.float()
    assert (after - wanted).norm() < 0.8 * (before - wanted).norm()
    config = json.loads((tmp_path / "out" / "loftq_init" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(backbones / kind)


def save_gguf(source: Path, file: Path) -> Path:
    """The pico llama as llama.cpp names it, its linears in Q4_0, with the rows of queries and keys permuted."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(320)
    writer.add_layer_norm_rms_eps(1e-6)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in load_file(source / "model.safetensors").items():
        values = tensor.float().numpy()
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else None
        if heads is not None:
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        stem = f"{names.get_name(name.removesuffix('.weight'))}.weight"
        if "_proj" in name:
            kind = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor(stem, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stem, values)
    file.parent.mkdir()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file(pico: Path, tmp_path: Path, run: Run) -> None:
    """Q is what transformers itself loads from the file."""
    file = save_gguf(pico, tmp_path / "gguf" / "pico-Q4_0.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    given = {name: weight for name, weight in loaded.state_dict().items() if name.endswith("_proj.weight")}
    options = ("--rank", 8, "--svd", "exact", "--output", tmp_path / "out", "--json")
    made = run("quantize", pico, "--backbone", file, *options)
    assert made.exit_code == 0, made.stderr
    factors = load_file(tmp_path / "out" / "loftq_init" / "adapter_model.safetensors")
    source = source_weights(pico)
    assert {f"{row['name']}.weight" for row in json.loads(made.stdout)["layers"]} == given.keys()
    for name, weight in given.items():
        module = name.removesuffix(".weight")
        u, s, vh = torch.linalg.svd(source[module] - weight.double(), full_matrices=False)
        a, b = (factors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
        best = u[:, :8] * s[:8] @ vh[:8]
        assert (b @ a - best).norm() < 1e-3 * best.norm()
    assert run("verify", tmp_path / "out", "--source", pico).exit_code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f'from_pretrained("gguf", gguf_file="{file.name}"' in card
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    for name, message in {"broken.gguf": "cannot be read as GGUF", "none.gguf": "no such file"}.items():
        refused = run("quantize", pico, "--backbone", tmp_path / name, "--output", tmp_path / "refused")
        assert refused.exit_code == 1
        assert message in refused.stderr


def test_calibrated_factors_are_the_best_for_the_outputs(backbones: Path, pico: Path, tmp_path: Path) -> None:
    """Given the moment, the closed form is a minimum: no change of B or A makes the error of the outputs smaller."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options: Any = {"rank": 4, "calibration": text, "calibration_tokens": 4096, "sequence_length": 64}
    report = loftq.quantize(str(pico), backbone=backbones / "nf4", output=tmp_path / "out", **options)
    plain = loftq.quantize(str(pico), backbone=backbones / "nf4", output=tmp_path / "plain", rank=4)
    assert report.recipe["method"] == "qera"
    assert report.totals["output_error"] < 0.7 * report.totals["output_plain_error"]
    assert report.totals["error"] > plain.totals["error"]
    statistics = next(path for path in tmp_path.iterdir() if "calibration" in path.name)
    record = json.loads((statistics / "calibration.json").read_text())
    name = "model.layers.0.mlp.down_proj"
    file = load_file(statistics / record["modules"][name]["file"])
    h = torch.zeros(128, 128, dtype=torch.float64)
    at = 0
    for panel in (file[str(i)].double() for i in range(len(file))):
        h[at : at + len(panel), at:], h[at:, at : at + len(panel)] = panel, panel.t()
        at += len(panel)
    h += 0.01 * h.diagonal().mean() * torch.eye(128, dtype=torch.float64)
    root = torch.linalg.cholesky(h)
    residual = source_weights(pico)[name] - bitsandbytes_weights(backbones / "nf4")[name]
    s = torch.linalg.svdvals(residual @ root)
    row = next(row for row in report.layers if row["name"] == name)
    least = float(s[4:].square().sum().sqrt() / (source_weights(pico)[name] @ root).norm())
    assert row["output_error"] == pytest.approx(least, rel=1e-2)


def test_our_commands_take_the_folder(backbones: Path, pico: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    made = run("quantize", pico, "--backbone", backbones / "nf4", "--rank", "8", "--output", out)
    assert made.exit_code == 0, made.stderr
    assert 'subfolder="loftq_init"' in made.stdout
    words = ("--prompt", "Why?", "--max-new-tokens", 4)
    both = (backbones / "nf4", "--adapter", out / "loftq_init")
    answers = [run("generate", *names, *words) for names in ((out,), both)]
    assert answers[0].exit_code == 0, answers[0].stderr
    assert answers[0].stdout == answers[1].stdout != ""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Why?", "response": "So."}\n' * 4)
    for use in (lambda: loftq.load_qlora(out), lambda: loftq.train(out, data=data, output=tmp_path / "trained")):
        with pytest.raises(ArtifactError, match=r"is an adapter for .*nf4, which loftq did not write: load that model"):
            use()
    shown = run("inspect", out)
    assert shown.exit_code == 0, shown.stderr
    assert "rank 8" in shown.stdout
    assert run("verify", out).exit_code == 0
    checked = run("verify", out, "--source", pico)
    assert checked.exit_code == 0, checked.stderr + checked.stdout
    wrong = json.loads((out / "loftq.json").read_text())
    wrong["layers"][3]["error"] *= 1.01
    changed = Path(shutil.copytree(out, tmp_path / "changed"))
    (changed / "loftq.json").write_text(json.dumps(wrong))
    told = run("verify", changed, "--source", pico)
    assert told.exit_code == 1
    assert f"{wrong['layers'][3]['name']}: has the relative error" in told.stdout
    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "loftq quantize pico-llama --rank 8 --backbone nf4" in card
    again = run("quantize", pico, "--backbone", backbones / "nf4", "--rank", "8", "--output", out, "--resume")
    assert again.exit_code == 0, again.stderr
    assert "is a start folder, which has no errors" in run("report", out, "--html", tmp_path / "page.html").stderr
    other = run("quantize", pico, "--backbone", backbones / "fp4", "--rank", "8", "--output", out, "--resume")
    assert "its backbone differs" in other.stderr
    weights = out / "loftq_init" / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    save_file({**tensors, name: tensors[name] * 2}, weights)
    assert run("verify", out).exit_code == 1


def test_the_same_bytes_with_any_number_of_workers(backbones: Path, pico: Path, tmp_path: Path) -> None:
    made = [
        loftq.quantize(str(pico), backbone=backbones / "nf4", rank=4, workers=workers, output=tmp_path / str(workers))
        for workers in (1, 3)
    ]
    files = [(report.folder / "loftq_init" / "adapter_model.safetensors").read_bytes() for report in made]
    assert files[0] == files[1]
    planned = loftq.quantize(str(pico), backbone=backbones / "nf4", rank=4, dry_run=True, output=tmp_path / "none")
    assert planned.totals["adapter_bytes"] == made[0].totals["adapter_bytes"]
    assert not (tmp_path / "none").exists()


def test_some_modules(backbones: Path, pico: Path, tmp_path: Path) -> None:
    options: Any = {"target_modules": ["q_proj", "v_proj"], "rank": 4, "output": tmp_path / "out"}
    report = loftq.quantize(str(pico), backbone=backbones / "nf4", **options)
    assert {row["name"].rpartition(".")[2] for row in report.layers} == {"q_proj", "v_proj"}


def test_what_is_refused(backbones: Path, pico: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], message: str, backbone: Path = backbones / "nf4", **options: Any) -> None:
        with pytest.raises(error, match=message):
            loftq.quantize(str(pico), backbone=backbone, output=tmp_path / "out", **{"rank": 4, **options})
        assert not (tmp_path / "out").exists()

    other = pico_llama()
    torch.manual_seed(7)
    for parameter in other.parameters():
        parameter.data.normal_(0, 0.02)
    save_model(other, tmp_path / "other")
    stranger = save_bitsandbytes(tmp_path / "other", tmp_path / "stranger", bnb_4bit_quant_type="nf4")
    refused(SourceError, r"is not a quantization of .*: model.layers.0.self_attn.\w+ is farther", stranger)
    save_model(pico_llama(intermediate_size=192), tmp_path / "wider")
    wider = save_bitsandbytes(tmp_path / "wider", tmp_path / "w4")
    refused(SourceError, r"is not a quantization of .*: .*mlp.*192", wider)
    save_model(pico_llama(num_hidden_layers=3), tmp_path / "deeper")
    refused(SourceError, r"which lacks model.layers.2", save_bitsandbytes(tmp_path / "deeper", tmp_path / "d4"))
    unknown = Path(shutil.copytree(pico, tmp_path / "unknown"))
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "hqq"}}))
    refused(SourceError, r"is quantized with hqq, which cannot be read: expected fp8, mxfp4, bitsandbytes", unknown)
    refused(SourceError, "no such folder", tmp_path / "missing")
    refused(OptionError, "--source and --backbone exclude each other", source=str(pico))
    refused(OptionError, r"--bits 2: the weights of --backbone .* stay as they are", bits=2)
    refused(OptionError, r"--method cloq: with --backbone only the adapter is computed", method="cloq")
    mixed = save_bitsandbytes(
        pico, tmp_path / "mixed", bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["v_proj", "lm_head"]
    )
    refused(OptionError, r"v_proj.*: not quantized in .*mixed", mixed, target_modules=["v_proj", "q_proj"])
    made = loftq.quantize(str(pico), backbone=mixed, rank=4, output=tmp_path / "without")
    assert {row["name"].rpartition(".")[2] for row in made.layers}.isdisjoint({"v_proj", "lm_head"})
    assert made.notes[-1].startswith("not quantized in the backbone, so without an adapter: ")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty and not a loftq folder"):
        loftq.quantize(str(pico), backbone=backbones / "nf4", rank=4, output=tmp_path / "full")
