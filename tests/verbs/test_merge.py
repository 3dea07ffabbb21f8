"""Merging: what is written, by independent readings, and how the merged model answers.

Covers: cli/merge.py, loftq/artifacts/backbone.py, loftq/artifacts/pair.py, loftq/merging/model_folder.py,
loftq/merging/target.py, loftq/merging/logits.py, loftq/merging/report.py, loftq/merging/targets/to_bf16.py,
loftq/merging/targets/to_gguf_q4_1.py, loftq/merging/targets/to_gptq.py, loftq/merging/targets/to_int.py,
loftq/merging/targets/to_lora.py, loftq/merging/targets/to_mlx.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pico_llama, save_model
from grids import thinned
from mlx_runner import run_mlx
from oracles import read_gptq, read_packed, read_stream
from peft import PeftModel
from pico_tokenizers import byte_level
from picos import output_of, save_pico
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import loftq
from loftq.errors import ArtifactError, OptionError
from loftq.formats.artifact import open_artifact
from loftq.merging import logits
from loftq.models.packed_linear import PackedLinear
from loftq.models.tasks import TASKS, auto_class

TOKENS = torch.tensor([[11, 42, 7, 99, 3, 250, 17, 5]])
QALORA: dict[str, Any] = {"adapter": "qalora", "group_size": 16, "rank": 2, "iters": 2, "alpha": 4, "quiet": True}
QLORA: dict[str, Any] = {"rank": 4, "iters": 2, "alpha": 8, "quiet": True}


def make(source: Path, out: Path, **options: Any) -> Path:
    return loftq.quantize(str(source), output=out, **options).folder


def train(folder: Path, out: Path, load: Callable[..., Any]) -> Path:
    """A trained adapter of a folder: its factors moved from where they began."""
    model = load(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)
        elif "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(out)
    return out


def merge(folder: Path, adapter: Path, out: Path, **options: Any) -> Any:
    return loftq.merge(folder, adapter, output=out, quiet=True, **options)


@pytest.fixture(scope="module")
def pooled(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A QA-LoRA folder of 4 bits in our format, and a trained adapter."""
    scratch = tmp_path_factory.mktemp("pooled")
    folder = make(pico, scratch / "folder", **QALORA)
    return folder, train(folder, scratch / "trained", loftq.load_qalora)


def own(tensors: dict[str, torch.Tensor], module: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{module}."): t for key, t in tensors.items() if key.startswith(f"{module}.")}


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits.double()


WIDTHS = [2, 3, 4, 8]
EXTRAS: list[dict[str, Any]] = [
    {},
    {"format": "gptq"},
    {"pool_size": 32},
    {"double_quant": True},
    {"zero_point": "integer", "format": "loftq"},
]


@pytest.mark.parametrize(
    ("bits", "extra"),
    thinned(
        ((bits, extra) for extra in EXTRAS for bits in WIDTHS),
        lambda bits, extra: WIDTHS.index(bits) == EXTRAS.index(extra) % 4,
    ),
    ids=str,
)
def test_the_exact_merge(bits: int, extra: dict[str, Any], pico: Path, tmp_path: Path) -> None:
    """Oracles: the codes on disk, bit for bit; numpy's reading of both folders; the logits with the adapter."""
    folder = make(pico, tmp_path / "folder", bits=bits, **{**QALORA, **extra})
    trained = train(folder, tmp_path / "trained", loftq.load_qalora)
    report = merge(folder, trained, tmp_path / "out", to="int")
    assert report.difference < 1e-5
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    factors = load_file(trained / "adapter_model.safetensors")
    pool = extra.get("pool_size", 16)
    for row in open_artifact(folder).manifest["layers"]:
        name, shape = row["name"], tuple(row["shape"])
        old, new = own(before, name), own(after, name)
        stream = old["qweight"].t().contiguous().view(torch.uint8).view(-1) if "qweight" in old else old["weight"]
        assert torch.equal(new["weight"], stream)
        rounded = read_gptq(old, bits, shape) if "qweight" in old else read_packed(old, f"int{bits}", 16, shape)
        b, a = (factors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "BA")
        delta = (2 * shape[1] / pool / pool * b @ a).repeat_interleave(pool, dim=1)
        found = read_packed(new, f"int{bits}", 16, shape)
        assert float((found - rounded - delta).norm()) < 1e-6 * float(rounded.norm())
    wanted = logits_of(loftq.load_qalora(folder, trained, dtype=torch.float32))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert sum(isinstance(module, PackedLinear) for module in merged.modules()) == 14
    assert (logits_of(merged) - wanted).norm() < 1e-5 * wanted.norm()
    assert open_artifact(tmp_path / "out").manifest["kind"] == "merged"
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert (logits_of(half) - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize(
    ("name", "task", "close"),
    [
        ("gpt2", "causal-lm", 1e-5),
        ("t5", "seq2seq-lm", 1e-4),
        ("falcon", "causal-lm", 1e-5),
        ("mixtral", "causal-lm", 1e-5),
        ("bert", "sequence-classification", 0.01),  # its head is stored in 16 bits
    ],
)
def test_the_exact_merge_of_every_kind(name: str, task: str, close: float, tmp_path: Path) -> None:
    """Oracle: the outputs with the adapter on its backbone."""
    folder = make(save_pico(name, task, tmp_path / "source"), tmp_path / "folder", **QALORA)
    trained = train(folder, tmp_path / "trained", loftq.load_qalora)
    assert merge(folder, trained, tmp_path / "out", to="int").difference < close
    adapted = loftq.load_qalora(folder, trained, dtype=torch.float32, is_trainable=False)
    merged = auto_class(TASKS[task]).from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        wanted, found = output_of(adapted.eval(), merged), output_of(merged.eval())
    assert (found - wanted).norm() < close * wanted.norm()


CASES = [
    ("llama", "causal-lm", {**QLORA}),
    ("llama", "causal-lm", {**QLORA, "double_quant": True}),
    ("llama", "causal-lm", {**QLORA, "bits": 2}),
    ("llama", "causal-lm", {**QLORA, "bits": 2.5}),
    ("llama", "causal-lm", {**QLORA, "bits": 8}),
    ("llama", "causal-lm", {**QLORA, "bits": 3, "quant_type": "int", "group_size": 32}),
    ("llama", "causal-lm", {**QALORA, "bits": 3}),
    ("llama", "causal-lm", {**QALORA, "bits": 3, "format": "gptq", "pool_size": 32}),
    ("gpt2", "causal-lm", {**QLORA}),
    ("t5", "seq2seq-lm", {**QLORA}),
    ("falcon", "causal-lm", {**QLORA}),
    ("bert", "sequence-classification", {**QLORA}),
    ("bert", "sequence-classification", {**QALORA}),
]


REPEATED = (
    {**QLORA, "double_quant": True},  # read by the same code as others: in `test_the_exact_merge`, too
    {**QLORA, "bits": 2},
    {**QALORA, "bits": 3},
)


@pytest.mark.parametrize(
    ("name", "task", "options"), thinned(CASES, lambda _, __, options: options not in REPEATED), ids=str
)
def test_a_dense_model_of_anything(name: str, task: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Oracles: the outputs with the adapter on its backbone, and a stock load without a warning of missing weights."""
    source = save_pico(name, task, tmp_path / "source")
    folder = make(source, tmp_path / "folder", max_shard_size="80KB", **options)
    load = loftq.load_qalora if options.get("adapter") else loftq.load_qlora
    trained = train(folder, tmp_path / "trained", load)
    report = merge(folder, trained, tmp_path / "out", to="bf16", max_shard_size="80KB")
    assert report.difference < 0.1  # bfloat16 weights
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    adapted = load(folder, trained, dtype=torch.float32, is_trainable=False)
    merged, loading = auto_class(TASKS[task]).from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    with torch.no_grad():
        wanted = output_of(adapted.eval(), merged)
        found = output_of(merged.eval())
    assert (found - wanted).norm() < 0.1 * wanted.norm()
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_the_dense_weight_is_backbone_plus_adapter(pico: Path, tmp_path: Path) -> None:
    """Oracle: bitsandbytes' own dequantization plus peft's scaling times B·A, rounded once."""
    from bitsandbytes.functional import dequantize_4bit

    folder = make(pico, tmp_path / "folder", **QLORA)
    trained = train(folder, tmp_path / "trained", loftq.load_qlora)
    merge(folder, trained, tmp_path / "out", to="bf16")
    model = loftq.load_qlora(folder, trained, dtype=torch.float32).base_model.model
    dense = load_file(tmp_path / "out" / "model.safetensors")
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert len(layers) == 14
    for name, layer in layers.items():
        state = layer.base_layer.weight.quant_state
        weight = dequantize_4bit(layer.base_layer.weight.data, state)
        weight = weight + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        found = dense[f"{name}.weight"]
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), weight, rtol=2**-8, atol=1e-7)


def test_rounding_the_zero_points_is_refused_with_what_it_would_lose(pooled: tuple[Path, Path], tmp_path: Path) -> None:
    """Oracle: the adapter's ΔW and the difference that is left of it on disk, in float64."""
    folder, trained = pooled
    with pytest.raises(
        OptionError, match=r"would lose .*the adapter.*rounding zero-points.*--to int.*--allow-rounding"
    ):
        merge(folder, trained, tmp_path / "out", to="gptq")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_adds_nothing_yet_is_no_measure(pooled: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="the adapter adds nothing yet, and rounding moves the weights"):
        loftq.merge(pooled[0], to="gptq", output=tmp_path / "out", quiet=True)


def test_rounding_the_zero_points_where_it_is_allowed(tmp_path: Path) -> None:
    """Oracle: numpy's reading of both folders, in float64."""
    source = save_model(pico_llama(), tmp_path / "source")
    folder = make(source, tmp_path / "folder", bits=3, format="gptq", **QALORA)
    trained = train(folder, tmp_path / "trained", loftq.load_qalora)
    report = merge(folder, trained, tmp_path / "out", to="gptq", allow_rounding=True)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    factors = load_file(trained / "adapter_model.safetensors")
    lost = whole = 0.0
    for row in open_artifact(folder).manifest["layers"]:
        name, shape = row["name"], tuple(row["shape"])
        old, new = own(before, name), own(after, name)
        for key in ("qweight", "scales", "g_idx"):
            assert torch.equal(old[key], new[key])
        b, a = (factors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "BA")
        delta = (2 * shape[1] / 16 / 16 * b @ a).repeat_interleave(16, dim=1)
        moved = read_gptq(new, 3, shape) - read_gptq(old, 3, shape)
        lost += float((moved - delta).square().sum())
        whole += float(delta.square().sum())
    assert report.lost == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert report.difference is not None
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None


def test_a_plain_lora_computes_the_same(pooled: tuple[Path, Path], tmp_path: Path) -> None:
    """Oracle: the logits of the QA-LoRA adapter, by peft's plain LoRA on the same backbone."""
    folder, trained = pooled
    merge(folder, trained, tmp_path / "out", to="lora")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "use_qalora" not in config
    wanted = logits_of(loftq.load_qalora(folder, trained, dtype=torch.float32))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, tmp_path / "out")
    assert (logits_of(plain) - wanted).norm() < 1e-5 * wanted.norm()


def test_what_does_not_merge_exactly_is_refused(pooled: tuple[Path, Path], tmp_path: Path) -> None:
    folder, trained = pooled
    source = save_model(pico_llama(), tmp_path / "source")
    plain = make(source, tmp_path / "plain", **QLORA)
    other = make(source, tmp_path / "other", **{**QALORA, "seed": 1, "iters": 0})
    symmetric = make(source, tmp_path / "symmetric", zero_point="symmetric", format="gptq", **QALORA)
    for where, adapter, said in (
        (plain, plain / "loftq_init", "is a plain LoRA: .*--to bf16, or train a QA-LoRA"),
        (symmetric, symmetric / "loftq_init", "no zero-points to merge into.*requantize with"),
        (other, trained, f"was trained on {folder}, another backbone than {other}"),
        (folder, plain / "loftq_init", "is a plain LoRA adapter: .* takes a QA-LoRA"),
        (tmp_path, trained, "no loftq.json"),
        (folder, tmp_path, "holds no adapter_config.json"),
    ):
        with pytest.raises((OptionError, ArtifactError), match=said):
            merge(where, adapter, tmp_path / "out", to="int")
        assert not (tmp_path / "out").exists()


def test_another_backbones_adapter_is_merged_into_16_bits_with_a_warning(
    pooled: tuple[Path, Path], pico: Path, tmp_path: Path
) -> None:
    _, trained = pooled
    other = make(pico, tmp_path / "other", **{**QALORA, "iters": 0})
    report = merge(other, trained, tmp_path / "out", to="bf16")
    assert "another backbone" in report.notes[0]
    assert "another backbone" in report.table()


@pytest.mark.parametrize("act_order", [False, True])
def test_somebody_elses_gptq_checkpoint(act_order: bool, pico: Path, tmp_path: Path) -> None:
    """Oracle: the logits with the adapter. Act-order groups are of scattered inputs: the exact merge is refused."""
    folder = make(
        pico, tmp_path / "folder", bits=4, format="gptq", **{**QALORA, "adapter": "lora", "quant_type": "int"}
    )
    theirs = shutil.copytree(folder, tmp_path / "theirs")
    (theirs / "loftq.json").unlink()
    shutil.rmtree(theirs / "loftq_init")
    if act_order:
        tensors = load_file(theirs / "model.safetensors")
        for key in [key for key in tensors if key.endswith("g_idx")]:
            order = torch.randperm(len(tensors[key]), generator=torch.Generator().manual_seed(0))
            tensors[key] = tensors[key][order].contiguous()
        save_file(tensors, theirs / "model.safetensors", metadata={"format": "pt"})
    model = loftq.load_qalora(theirs, rank=2, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "trained")
    assert merge(theirs, tmp_path / "trained", tmp_path / "dense", to="bf16").difference < 0.05
    if act_order:
        with pytest.raises(OptionError, match=r"act-order checkpoint: .*--to bf16"):
            merge(theirs, tmp_path / "trained", tmp_path / "out", to="int")
    else:
        assert merge(theirs, tmp_path / "trained", tmp_path / "out", to="int").difference < 1e-5
    small = loftq.load_qalora(theirs, rank=2, pool_size=8)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(OptionError, match=r"pools 8 inputs, which is not a multiple of the group size 16|act-order"):
        merge(theirs, tmp_path / "small", tmp_path / "out", to="int", overwrite=True)
    with pytest.raises(OptionError, match="has no adapter of its own: name a trained one with --adapter"):
        loftq.merge(theirs, to="int", output=tmp_path / "none")


def test_a_merge_that_answers_otherwise_is_not_kept(
    pooled: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Break it: shifts without the adapter."""
    from loftq.artifacts.pair import BackboneAndAdapter

    monkeypatch.setattr(BackboneAndAdapter, "correction", lambda *_: None)
    with pytest.raises(ArtifactError, match=r"outputs of the merged model differ .* Nothing was written"):
        merge(*pooled, tmp_path / "out", to="int")
    assert not (tmp_path / "out").exists()


def test_a_merge_that_was_cut_off_is_finished(
    pooled: tuple[Path, Path], run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the bytes of an undisturbed merge."""
    from loftq.merging.targets.to_int import Integers

    merge(*pooled, tmp_path / "whole", to="int")
    done = Integers.tensors

    def cut(target: Integers, module: str) -> dict[str, torch.Tensor]:
        if "layers.1.mlp" in module:
            raise KeyboardInterrupt
        return done(target, module)

    options = [pooled[0], "--adapter", pooled[1], "--to", "int", "--output", tmp_path / "out", "--quiet"]
    with monkeypatch.context() as patched:
        patched.setattr(Integers, "tensors", cut)
        assert run("merge", *options).exit_code == 130
    assert not (tmp_path / "out" / "config.json").exists()
    ended = run("merge", *options)
    assert ended.exit_code == 1
    assert "--resume" in ended.stderr
    assert run("merge", *options, "--resume").exit_code == 0
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_check_can_be_left_out(pooled: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "load_base", lambda *_: pytest.fail("a model was loaded"))
    assert merge(*pooled, tmp_path / "out", to="int", check=False).difference is None


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mlx_holds_the_exact_merge(bits: int, pico: Path, tmp_path: Path) -> None:
    """Oracle: numpy's reading of MLX's words, and of the merge in our own format."""
    options = {**QALORA, "bits": bits, "group_size": 32, "rank": 2}
    folder = make(pico, tmp_path / "folder", **options)
    trained = train(folder, tmp_path / "trained", loftq.load_qalora)
    merge(folder, trained, tmp_path / "mlx", to="mlx")
    merge(folder, trained, tmp_path / "int", to="int")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("int", "mlx"))
    for row in open_artifact(folder).manifest["layers"]:
        name, shape = row["name"], tuple(row["shape"])
        words = own(theirs, name)
        codes = read_stream(words["weight"].numpy().view(np.uint8).reshape(-1), bits, shape[0] * shape[1])
        scales, biases = (words[key].double().repeat_interleave(32, dim=1) for key in ("scales", "biases"))
        found = torch.from_numpy(codes.reshape(shape)) * scales + biases
        wanted = read_packed(own(ours, name), f"int{bits}", 32, shape)
        assert float((found - wanted).norm()) < 1e-6 * float(wanted.norm())
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": bits, "mode": "affine"}


@pytest.mark.parametrize("bits", thinned([(2,), (3,), (4,)], lambda bits: bits == 3))
def test_mlx_lm_runs_the_export(bits: int, pico: Path, tmp_path: Path) -> None:
    """Oracle: the logits with the adapter."""
    folder = make(pico, tmp_path / "folder", **{**QALORA, "bits": bits, "group_size": 32, "rank": 2})
    trained = train(folder, tmp_path / "trained", loftq.load_qalora)
    merge(folder, trained, tmp_path / "mlx", to="mlx")
    found = run_mlx("logits", tmp_path / "mlx", tmp_path / "out.npz", *TOKENS[0].tolist())
    wanted = logits_of(loftq.load_qalora(folder, trained, dtype=torch.float32))
    assert (torch.from_numpy(found["logits"]) - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_gguf(kind: str, tmp_path: Path) -> None:
    """Oracle: transformers' own reader of GGUF, and the logits with the adapter: minima have 16 bits there."""
    source = save_pico(kind, "causal-lm", tmp_path / "source")
    byte_level("qwen2" if kind == "qwen2" else "llama-bpe").save_pretrained(source)
    folder = make(source, tmp_path / "folder", **{**QALORA, "group_size": 64, "rank": 1})
    trained = train(folder, tmp_path / "trained", loftq.load_qalora)
    report = merge(folder, trained, tmp_path / "out", to="gguf-q4_1")
    files = [path.name for path in (tmp_path / "out").glob("*.gguf")]
    assert files == ["folder-q4_1.gguf"]
    assert report.bytes == (tmp_path / "out" / files[0]).stat().st_size
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=files[0], dtype=torch.float32)
    wanted = logits_of(loftq.load_qalora(folder, trained, dtype=torch.float32))
    assert (logits_of(read) - wanted).norm() < 5e-3 * wanted.norm()
    merge(folder, trained, tmp_path / "out", to="gguf-q4_1", overwrite=True)


@pytest.mark.parametrize(
    ("options", "to", "said"),
    [
        ({"bits": 3}, "gguf-q4_1", "holds integers of 4 bits, not 3: use --to mlx"),
        ({"bits": 4}, "gguf-q4_1", "groups of a multiple of 32"),
        ({"bits": 4}, "mlx", "holds groups of 32, 64, 128 inputs, not 16"),
        ({"bits": 3.5}, "gptq", "several widths, but a GPTQ folder has only one: use --to int"),
    ],
)
def test_what_a_target_cannot_hold(options: dict[str, Any], to: str, said: str, pico: Path, tmp_path: Path) -> None:
    folder = make(pico, tmp_path / "folder", **{**QALORA, **options})
    with pytest.raises(OptionError, match=said):
        loftq.merge(folder, to=to, output=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out" / "loftq.json").exists()


def test_the_initial_adapter_is_the_default(pooled: tuple[Path, Path], tmp_path: Path) -> None:
    """Its B is zero: nothing changes but the zero-points' bits."""
    folder, _ = pooled
    loftq.merge(folder, to="int", output=tmp_path / "out", quiet=True)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    for name, tensor in before.items():
        if name.endswith("weight_shifts"):
            assert after[name].dtype == torch.float32
        assert torch.equal(after[name], tensor.to(after[name].dtype))


def test_the_command(pooled: tuple[Path, Path], run: Callable[..., Any], tmp_path: Path) -> None:
    folder, trained = pooled
    options = ["--adapter", trained, "--output", tmp_path / "out", "--quiet"]
    ended = run("merge", folder, *options, "--to", "int", "--json")
    assert json.loads(ended.stdout)["difference"] < 1e-5
    ended = run("merge", folder, *options, "--to", "int")
    assert ended.exit_code == 1
    assert "--overwrite" in ended.stderr
    ended = run("merge", folder, *options, "--to", "bf16", "--overwrite")
    assert ended.exit_code == 0
    assert "14 linears, --to bf16" in ended.stdout
    assert "logits" in ended.stdout
    for wrong, said in (
        (["--to", "fp8"], "unknown target 'fp8'"),
        (["--to", "gptq", "--overwrite"], "--allow-rounding"),
        (["--to", "int", "--overwrite", "--resume"], "exclude each other"),
    ):
        ended = run("merge", folder, *options, *wrong)
        assert ended.exit_code == 2
        assert said in ended.stderr
    assert "--allow-rounding" in run("merge", "--help").stdout
