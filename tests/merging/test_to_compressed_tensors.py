"""Merging into compressed-tensors: what its own package reads, and how the merged model answers.

Covers: loftq/merging/targets/to_compressed_tensors.py, loftq/merging/calibration.py, loftq/merging/checkpoint_names.py,
loftq/merging/settings.py, loftq/formats/compressed_tensors.py.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grids import thinned
from mixtures import save_mixture
from picos import save_pico
from safetensors.torch import load_file

import loftq
from loftq.artifacts.pair import BackboneAndAdapter, open_pair
from loftq.core.grid import Grid
from loftq.core.moments import assemble
from loftq.errors import ArtifactError, LoftQError, OptionError
from loftq.formats import compressed_tensors
from loftq.merging.settings import MergeRun, MergeSettings
from loftq.merging.targets.to_compressed_tensors import CompressedTensors

pytest.importorskip("compressed_tensors")


def trained(folder: Path, out: Path, load: Callable[..., Any] = loftq.load_qlora) -> Path:
    """A trained adapter: its factors moved from where they began."""
    model = load(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.03 * torch.randn(parameter.shape)
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def pair(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An NF4 folder and a trained adapter."""
    scratch = tmp_path_factory.mktemp("pair")
    folder = loftq.quantize(str(pico), output=scratch / "folder", rank=4, iters=1, quiet=True).folder
    return folder, trained(folder, scratch / "trained")


def decompressed(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of all linears, read by the compressed-tensors package."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(entry).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    tensors = load_file(folder / "model.safetensors")
    modules = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    parts = {
        module: {name.removeprefix(f"{module}."): t for name, t in tensors.items() if name.startswith(f"{module}.")}
        for module in modules
    }
    return {module: compressor.decompress(state, scheme)["weight"] for module, state in parts.items()}


SETTINGS = [
    {"bits": bits, "zero_point": zero_point, "group_size": size}
    for bits in (4, 8)
    for zero_point in ("symmetric", "integer")
    for size in (32, 64)
]


@pytest.mark.parametrize(
    "settings",
    thinned(
        [(settings,) for settings in SETTINGS],
        lambda settings: (settings["zero_point"] == "integer") == (settings["group_size"] == 32),
    ),
    ids=str,
)
def test_the_package_reads_the_nearest_levels(
    settings: dict[str, Any], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Oracles: the package's own compression under the same scales, bit for bit, and our own reader of the layout."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    report = loftq.merge(*pair, to="compressed-tensors", output=tmp_path / "out", quiet=True, **settings)
    assert report.difference is not None
    assert report.difference < (0.5 if settings["bits"] == 4 else 0.05)
    found = decompressed(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    merged = open_pair(*pair)
    symmetric = settings["zero_point"] == "symmetric"
    args = QuantizationArgs(
        num_bits=settings["bits"], group_size=settings["group_size"], symmetric=symmetric, strategy="group"
    )
    assert len(found) == 14
    for module, weight in found.items():
        scale, zero = tensors[f"{module}.weight_scale"], None
        if not symmetric:
            shape = (len(weight), scale.shape[1])
            zero = unpack_from_int32(tensors[f"{module}.weight_zero_point"], args.num_bits, shape, packed_dim=0)
        expected = fake_quantize(merged.merged(module), scale.float(), zero, args)
        grid = Grid(f"int{args.num_bits}", settings["group_size"], zero_point=settings["zero_point"])
        assert torch.equal(compressed_tensors.dense(module, weight.shape, grid, tensors.__getitem__), weight)
        assert float((expected.bfloat16() != weight).float().mean()) < 1e-3  # halves are rounded to either side


def test_text_lowers_the_error_of_the_outputs(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Oracle: tr(E H Eᵀ) in float64, with H from the folder of statistics; the same statistics serve twice."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} says that {i * i} is the square of {i}.\n" for i in range(400)))
    options: dict[str, Any] = {
        "calibration": text,
        "calibration_tokens": 4096,
        "sequence_length": 128,
        "statistics": tmp_path / "statistics",
    }
    loftq.merge(*pair, to="compressed-tensors", output=tmp_path / "plain", quiet=True)
    loftq.merge(*pair, to="compressed-tensors", output=tmp_path / "out", quiet=True, **options)
    record = (tmp_path / "statistics" / "calibration.json").stat().st_mtime_ns
    again = loftq.merge(*pair, to="compressed-tensors", output=tmp_path / "again", quiet=True, **options)
    assert again.difference is not None
    assert (tmp_path / "statistics" / "calibration.json").stat().st_mtime_ns == record
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    merged = open_pair(*pair)
    plain, calibrated = (decompressed(tmp_path / name) for name in ("plain", "out"))
    modules = json.loads((tmp_path / "statistics" / "calibration.json").read_text())["modules"]
    ratios = []
    for module in plain:
        panels = load_file(tmp_path / "statistics" / modules[module]["file"])
        moment = assemble([panels[str(i)] for i in range(len(panels))]).double()
        errors = [merged.merged(module).double() - each[module].double() for each in (plain, calibrated)]
        before, after = (float(((error @ moment) * error).sum()) for error in errors)
        ratios.append(after / before)
    assert max(ratios) < 0.95, ratios
    assert sum(ratios) / len(ratios) < 0.7, ratios


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a mixture, experts too, and a trained adapter."""
    scratch = tmp_path_factory.mktemp("mixture")
    source = save_mixture("mixtral", scratch / "source")
    folder = loftq.quantize(str(source), output=scratch / "folder", rank=4, iters=1, block_size=32, quiet=True).folder
    return folder, trained(folder, scratch / "trained")


def test_a_mixture_has_the_names_of_its_family(mixture: tuple[Path, Path], tmp_path: Path) -> None:
    """Oracles: the package's decompression, and the weights of the dense merge under the same names."""
    loftq.merge(*mixture, to="bf16", output=tmp_path / "dense", quiet=True, check=False)
    report = loftq.merge(*mixture, to="compressed-tensors", output=tmp_path / "out", quiet=True, bits=8, group_size=32)
    assert report.difference is not None
    assert report.difference < 0.05
    dense, found = load_file(tmp_path / "dense" / "model.safetensors"), decompressed(tmp_path / "out")
    assert len(found) == 2 * (4 + 4 * 3)
    assert "model.layers.1.block_sparse_moe.experts.3.w2" in found
    for name, weight in found.items():
        assert float((dense[f"{name}.weight"].float() - weight.float()).norm()) < 0.01 * float(weight.float().norm())
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert entry["ignore"] == [*(f"model.layers.{layer}.block_sparse_moe.gate" for layer in (0, 1)), "lm_head"]


def test_text_lowers_the_error_of_experts(mixture: tuple[Path, Path], tmp_path: Path) -> None:
    """Oracle: the outputs of experts in float64 for random tokens that lie as those of the text do."""
    options: dict[str, Any] = {"to": "compressed-tensors", "group_size": 32, "quiet": True, "check": False}
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} says that {i * i} is the square of {i}.\n" for i in range(400)))
    calibrated = {"calibration": text, "calibration_tokens": 4096, "sequence_length": 128}
    loftq.merge(*mixture, output=tmp_path / "plain", **options)
    loftq.merge(*mixture, output=tmp_path / "out", statistics=tmp_path / "statistics", **calibrated, **options)
    loftq.merge(*mixture, to="bf16", output=tmp_path / "dense", quiet=True, check=False)
    record = json.loads((tmp_path / "statistics" / "calibration.json").read_text())
    owner, experts = "model.layers.0.mlp.experts", "model.layers.0.block_sparse_moe.experts"
    tokens = load_file(tmp_path / "statistics" / record["modules"][owner]["file"])["tokens"].double()
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    plain, rounded = (decompressed(tmp_path / name) for name in ("plain", "out"))
    names = [f"{experts}.{expert}.{part}" for expert in range(4) for part in ("w1", "w3")]
    ratios = []
    for name in names:
        errors = [each[name].double() - dense[f"{name}.weight"].double() for each in (plain, rounded)]
        before, after = (float((tokens @ error.t()).norm()) for error in errors)
        ratios.append(after / before)
    assert max(ratios) < 1, ratios
    assert sum(ratios) / len(ratios) < 0.9, ratios


def test_a_merge_without_the_adapter_of_one_linear_is_not_kept(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Break it: what is rounded lacks one adapter."""
    whole = BackboneAndAdapter.delta
    monkeypatch.setattr(
        BackboneAndAdapter,
        "delta",
        lambda self, module: None if module.endswith("0.self_attn.o_proj") else whole(self, module),
    )
    with pytest.raises(ArtifactError, match=r"outputs of the merged model differ .* Nothing was written"):
        loftq.merge(*pair, to="compressed-tensors", output=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 3}, "--bits 3: --to compressed-tensors holds 4 or 8"),
        ({"group_size": 48}, "--group-size 48: .*groups of 128, 64, 32"),
        ({"group_size": 128}, "groups of 128 do not divide the 64 inputs of model.layers.0"),
        ({"zero_point": "float"}, "unknown zero-point of --to compressed-tensors 'float'"),
        ({"statistics": "here"}, "--statistics here: needs text"),
        ({"allow_rounding": True}, "--allow-rounding: --to compressed-tensors does not use it, only --to gptq"),
        ({"calibration": "missing.txt"}, "missing.txt"),
    ],
)
def test_what_it_refuses(settings: dict[str, Any], said: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(LoftQError, match=said):
        loftq.merge(*pair, to="compressed-tensors", output=tmp_path / "out", quiet=True, **settings)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break it: no package is found. Without the check of logits none is needed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(OptionError, match=r"pip install compressed-tensors, or add --no-check"):
        loftq.merge(*pair, to="compressed-tensors", output=tmp_path / "out", quiet=True)
    loftq.merge(*pair, to="compressed-tensors", output=tmp_path / "out", quiet=True, check=False)


def test_experts_in_one_tensor_are_refused(tmp_path: Path) -> None:
    source = save_mixture("granitemoe", tmp_path / "source")
    folder = loftq.quantize(str(source), output=tmp_path / "f", rank=2, iters=1, block_size=32, quiet=True).folder
    with pytest.raises(OptionError, match=r"needs a tensor for each expert, and .* one for all of them .*--to bf16"):
        loftq.merge(folder, to="compressed-tensors", output=tmp_path / "out", quiet=True)


def test_families_without_linears_of_torch_are_refused(tmp_path: Path) -> None:
    source = save_pico("gpt2", "causal-lm", tmp_path / "source")
    folder = loftq.quantize(str(source), output=tmp_path / "folder", rank=2, iters=1, quiet=True).folder
    with pytest.raises(OptionError, match=r"holds only nn.Linear, and .* is a Conv1D: use --to bf16"):
        loftq.merge(folder, to="compressed-tensors", output=tmp_path / "out", quiet=True)


def test_a_classifier_and_a_qalora(tmp_path: Path) -> None:
    """Oracle: transformers' own loading of the folder, which names every tensor that it cannot place."""
    source = save_pico("bert", "sequence-classification", tmp_path / "source")
    options: dict[str, Any] = {"adapter": "qalora", "group_size": 32, "rank": 2, "iters": 1, "quiet": True}
    folder = loftq.quantize(str(source), output=tmp_path / "folder", **options).folder
    adapter = trained(folder, tmp_path / "trained", loftq.load_qalora)
    report = loftq.merge(folder, adapter, to="compressed-tensors", output=tmp_path / "out", quiet=True, bits=8)
    assert any("whole zero-points" in note for note in report.notes)
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "classifier" in entry["ignore"]
    model = CompressedTensors.load(
        CompressedTensors(open_pair(folder, adapter), MergeSettings(), MergeRun()), tmp_path / "out"
    )
    assert model.classifier.weight.dtype == torch.float32
