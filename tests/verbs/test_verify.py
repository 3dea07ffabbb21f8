"""Verify: what is sound is found sound, and what is not is named, whatever was done to the folder.

Covers: cli/verify.py, loftq/artifacts/checks.py, loftq/artifacts/recompute.py, loftq/artifacts/zeroed.py.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, pico_llama, save_model
from folders import described
from picos import save_pico
from safetensors.torch import load_file, save_file

import loftq
from loftq.calibration import windows
from loftq.errors import ArtifactError, OptionError, SourceError
from loftq.formats.artifact import combine_hashes
from loftq.hub.text import read_text

Run = Callable[..., Result]
ADAPTER = "loftq_init/adapter_model.safetensors"
LAYER = "model.layers.1.mlp.up_proj"
SOUND: dict[str, dict[str, Any]] = {
    "nf4": {"alpha": 2},
    "nf4, doubly quantized": {"double_quant": True, "rslora": True},
    "nf4, QLoRA": {"iters": 0},
    "nf4, q_proj and v_proj": {"target_modules": ["q_proj", "v_proj"], "compute_dtype": "float16"},
    "int8 of bitsandbytes": {"bits": 8},
    "nf2": {"bits": 2},
    "nf3, doubly quantized": {"bits": 3, "double_quant": True},
    "int4 of gptq": {"quant_type": "int", "group_size": 32},
    "int3, floating zero-points": {"bits": 3, "quant_type": "int", "zero_point": "float", "group_size": 32},
    "a budget": {"bits": 3.5},
    "first": {"bits": 3, "allocation": "first"},
    "qalora": {"adapter": "qalora", "group_size": 16, "rank": 2, "alpha": 4},
    "qalora of gptq": {"adapter": "qalora", "group_size": 16, "rank": 2, "format": "gptq"},
}


@pytest.fixture(scope="module")
def whole(pico_sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact in several shards. Do not write to it."""
    output = tmp_path_factory.mktemp("verify") / "whole"
    return loftq.quantize(str(pico_sharded), rank=4, iters=2, max_shard_size="60KB", output=output, quiet=True).folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def verify(folder: Path, source: Path | None = None) -> list[tuple[str, str]]:
    return [tuple(problem) for problem in loftq.verify(folder, source, quiet=True).problems]


def named(folder: Path, source: Path | None = None) -> set[str]:
    return {where for where, _ in verify(folder, source)}


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def change_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def hash_again(folder: Path) -> None:
    """Let the manifest have the hashes of the files as they are: what is then found is not found by them."""

    def edit(manifest: dict[str, Any]) -> None:
        manifest["files"] = described(folder, [name for name in manifest["files"] if (folder / name).is_file()])
        shards = {
            n: f["sha256"] for n, f in manifest["files"].items() if n.startswith("model") and n.endswith("tensors")
        }
        manifest["backbone_sha256"] = combine_hashes(shards)

    change(folder / "loftq.json", edit)


def shard_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


@pytest.mark.parametrize("kind", SOUND)
def test_a_fresh_folder_is_sound(kind: str, pico: Path, tmp_path: Path) -> None:
    options = {"rank": 4, "iters": 2, **SOUND[kind]}
    folder = loftq.quantize(str(pico), output=tmp_path / "out", quiet=True, **options).folder
    assert verify(folder, pico) == []


@pytest.mark.parametrize(
    ("name", "task", "options"),
    [
        ("gpt2", "causal-lm", {}),  # transposed, tied
        ("bert", "sequence-classification", {"num_labels": 3}),  # a head in the adapter
        ("t5", "seq2seq-lm", {}),
        ("falcon", "causal-lm", {}),  # in our layout
        ("qwen2_moe", "causal-lm", {}),  # fused experts
        ("deberta", "masked-lm", {}),  # in float32
    ],
)
def test_other_families_are_sound(name: str, task: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = save_pico(name, task, tmp_path / "source")
    folder = loftq.quantize(str(source), output=tmp_path / "out", rank=4, iters=1, quiet=True, **options).folder
    assert verify(folder, source) == []


def test_a_distilled_adapter_is_sound(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "MIN_TOKENS", 512)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(read_text("default"))[:40_000], encoding="utf-8")
    options: dict[str, Any] = {"calibration": text, "calibration_tokens": 1024, "sequence_length": 64, "refine": 2}
    folder = loftq.quantize(str(pico), output=tmp_path / "out", rank=4, quiet=True, **options).folder
    assert verify(folder, pico) == []


@pytest.mark.parametrize("to", ["int", "bf16", "lora"])
def test_merged_folders_are_compared_by_their_files(to: str, pico: Path, tmp_path: Path) -> None:
    folder = loftq.quantize(str(pico), output=tmp_path / "out", quiet=True, **SOUND["qalora"]).folder
    merged = loftq.merge(folder, to=to, output=tmp_path / "merged", check=False, quiet=True).folder
    assert verify(merged) == []
    name = "adapter_model.safetensors" if to == "lora" else "model.safetensors"
    content = bytearray((merged / name).read_bytes())
    content[-1] ^= 1
    (merged / name).write_bytes(content)
    assert named(merged) == {name}
    with pytest.raises(OptionError, match=f"--source .*: {merged} is a .* folder, which has no errors of layers"):
        loftq.verify(merged, pico, quiet=True)


def damage(path: Path, others: list[Path], draw: random.Random) -> str:
    """Change a file in one of the ways in which files get changed. Returns which."""
    content = bytearray(path.read_bytes())
    other = draw.choice(others)
    way = draw.choice(["a bit", "a byte", "a hole", "cut short", "longer", "gone", "another's"])
    at = draw.randrange(len(content))
    if way == "a bit":
        content[at] ^= 1 << draw.randrange(8)
    elif way == "a byte":
        content[at] ^= draw.randrange(1, 256)
    elif way == "a hole":
        content[at:] = b"\0" * len(content[at:]) if any(content[at:]) else b"\1" * len(content[at:])
    elif way == "cut short":
        del content[at:]
    elif way == "longer":
        content += b"\0"
    elif way == "another's":
        content = bytearray(other.read_bytes())
    path.write_bytes(content)
    if way == "gone":
        path.unlink()
    return f"{path.name}: {way} at {at}"


def test_a_hundred_corruptions_are_named(folder: Path) -> None:
    """Oracle: the file that was damaged, and no other that is listed."""
    manifest = json.loads((folder / "loftq.json").read_text())
    names = sorted(set(manifest["files"]) - {"README.md"})
    draw = random.Random(0)
    for _ in range(100):
        name = draw.choice([*names, *(n for n in names if n.endswith(".safetensors"))])
        before = (folder / name).read_bytes()
        others = [folder / other for other in names if (folder / other).read_bytes() != before]
        what = damage(folder / name, others, draw)
        files = {where for where, _ in verify(folder) if where in manifest["files"]}
        assert name in files, what
        assert files <= {name, "config.json"} | (
            {"loftq_init/adapter_config.json"} if "loftq_init" in name else set()
        ), what
        (folder / name).write_bytes(before)
    assert verify(folder) == []


def test_a_bit_anywhere_in_a_shard_is_named(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    before = path.read_bytes()
    header = int.from_bytes(before[:8], "little")
    for at in (0, 8, 7 + header, 8 + header, len(before) // 2, len(before) - 1):
        path.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
        assert (path.name, "SHA-256 mismatch") in verify(folder)


def test_a_missing_adapter_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "loftq_init")
    found = verify(folder)
    assert (ADAPTER, "is missing") in found
    assert ("loftq_init/adapter_config.json", "is missing") in found


@pytest.mark.parametrize("hashed", [False, True])
def test_a_swapped_config_is_named(hashed: bool, folder: Path, tmp_path: Path) -> None:
    other = save_model(pico_llama(num_hidden_layers=3), tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = json.loads((folder / "config.json").read_text())["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    if hashed:
        hash_again(folder)
    found = verify(folder)
    assert {where for where, _ in found} == {"config.json"}
    assert any("lacks the tensor 'model.layers.2" in what for _, what in found)


def test_the_card_may_be_edited(folder: Path) -> None:
    (folder / "README.md").write_text("my own")
    assert verify(folder) == []


@pytest.mark.parametrize("name", ["model.safetensors", "loftq_init/adapter_model-2.safetensors"])
def test_weights_that_are_not_listed_are_named(name: str, folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / name)
    assert (name, "is not listed in loftq.json, but loaders may read it") in verify(folder)


def test_what_is_listed_outside_the_folder_is_not_read(folder: Path) -> None:
    change(folder / "loftq.json", lambda manifest: manifest["files"].update({"../x": {"bytes": 1, "sha256": ""}}))
    assert ("../x", "lies outside the folder: loftq.json must not list it") in verify(folder)


def test_a_manifest_without_hashes_says_so(folder: Path, pico: Path) -> None:
    change(folder / "loftq.json", lambda manifest: [entry.pop("sha256") for entry in manifest["files"].values()])
    found = loftq.verify(folder, pico, quiet=True)
    assert found.problems == ()
    assert not found.sound  # nothing was wrong, but nobody can know it of files that only have hashes
    names = set(json.loads((folder / "loftq.json").read_text())["files"]) - {"README.md"}
    assert set(found.unchecked) == names
    (note,) = found.notes
    assert note.startswith(f"loftq.json has no hashes of {len(names)} files, so their contents were not compared")
    assert found.table().rstrip().endswith("not fully checked")


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", [f"{LAYER}.weight", f"{LAYER}.weight.absmax", "model.embed_tokens.weight", "all"])
def test_zeroed_weights_are_never_sound(name: str, recorded: bool, folder: Path) -> None:
    """The hashes are those of the damaged files. Without a record of the zeros, the norms of layers show them."""
    for path in folder.glob("*.safetensors") if name == "all" else [shard_of(folder, name)]:
        change_tensors(
            path, lambda tensors: [tensors[n].zero_() for n in tensors if name in ("all", n) and "quant_s" not in n]
        )
    hash_again(folder)
    if not recorded:
        change(folder / "loftq.json", lambda manifest: manifest.pop("zero_blocks"))
    found = loftq.verify(folder, quiet=True)
    assert not found.sound
    owner = LAYER if not recorded and LAYER in name else name
    assert name == "all" or owner in {where for where, _ in found.problems}


def test_a_hole_in_a_file_with_right_hashes_is_named(folder: Path) -> None:
    """A block of a disk is lost in the middle of a tensor."""
    path = shard_of(folder, "model.embed_tokens.weight")
    content = bytearray(path.read_bytes())
    at = 8 + int.from_bytes(content[:8], "little")
    at = -(-at // 512) * 512
    content[at : at + 1024] = bytes(1024)
    path.write_bytes(content)
    hash_again(folder)
    assert any("zero bytes" in what for _, what in verify(folder))


@pytest.mark.parametrize("key", ["layers", "files"])
def test_a_manifest_that_lists_nothing_is_not_sound(key: str, folder: Path) -> None:
    change(folder / "loftq.json", lambda manifest: manifest.update({key: type(manifest[key])()}))
    assert not loftq.verify(folder, quiet=True).sound


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.weight.absmax"), f"^{LAYER}.weight.absmax is missing"),
        (lambda t: t.update({f"{LAYER}.weight.absmax": t[f"{LAYER}.weight.absmax"].half()}), "absmax is float16"),
        (lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"][:-1].clone()}), r"is uint8 \(4095, 1\), expected"),
    ],
)
def test_headers_are_compared_where_hashes_are_right(
    edit: Callable[[dict[str, torch.Tensor]], object], message: str, folder: Path
) -> None:
    """Oracle: shapes and dtypes of bitsandbytes' layout."""
    change_tensors(shard_of(folder, f"{LAYER}.weight"), edit)
    stored = {name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)}
    change(folder / "model.safetensors.index.json", lambda index: index.update(weight_map=stored))
    hash_again(folder)
    found = verify(folder)
    assert any(re.search(message, f"{where} {what}") for where, what in found), found


@pytest.mark.parametrize(
    ("file", "edit", "where"),
    [
        ("loftq_init/adapter_config.json", {"r": 8}, "loftq_init/adapter_config.json"),
        ("loftq_init/adapter_config.json", {"lora_alpha": 8}, "loftq_init/adapter_config.json"),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "config.json"),
        ("config.json", {"vocab_size": 640}, "config.json"),
        ("loftq.json", {"backbone_sha256": "0"}, "loftq.json"),
    ],
)
def test_configurations_are_compared_where_hashes_are_right(
    file: str, edit: dict[str, Any], where: str, folder: Path
) -> None:
    change(folder / file, lambda content: content.update(edit))
    if file != "loftq.json":
        hash_again(folder)
    assert named(folder) == {where}


def test_an_adapter_that_lacks_a_layers_factors(folder: Path) -> None:
    name = f"base_model.model.{LAYER}.lora_B.weight"
    change_tensors(folder / ADAPTER, lambda tensors: tensors.pop(name))
    hash_again(folder)
    assert (name, "is missing") in verify(folder)


def test_embeddings_of_another_dtype(folder: Path) -> None:
    name = "model.embed_tokens.weight"
    change_tensors(shard_of(folder, name), lambda tensors: tensors.update({name: tensors[name].float()}))
    hash_again(folder)
    assert verify(folder) == [(name, "is stored as float32, loftq.json says bfloat16")]


@pytest.mark.parametrize("key", ["error", "plain_error"])
def test_totals_are_those_of_the_layers(key: str, folder: Path) -> None:
    change(folder / "loftq.json", lambda manifest: manifest["totals"].update({key: 0.01}))
    ((where, what),) = verify(folder)
    assert where == "loftq.json"
    assert f"has the total {key} 0.01, but its layers have" in what


def test_a_layer_of_other_codes_is_named(folder: Path, pico: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.weight"][:100] ^= 0x11

    change_tensors(shard_of(folder, f"{LAYER}.weight"), edit)
    hash_again(folder)
    assert verify(folder) == []  # nothing but the source shows it
    ((where, what),) = verify(folder, pico)
    assert where == LAYER
    assert re.fullmatch(r"has the relative error [\d.e-]+, loftq.json has [\d.e-]+", what)


def test_a_layer_of_other_factors_is_named(folder: Path, pico: Path) -> None:
    name = f"base_model.model.{LAYER}.lora_B.weight"
    change_tensors(folder / ADAPTER, lambda tensors: tensors[name].mul_(1.1))
    hash_again(folder)
    assert named(folder, pico) == {LAYER}


def test_a_layer_that_cannot_be_read_is_named(folder: Path, pico: Path) -> None:
    name = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
    change_tensors(shard_of(folder, name), lambda tensors: tensors[name].fill_(32))
    hash_again(folder)
    ((where, what),) = verify(folder, pico)
    assert where == LAYER
    assert what.startswith("cannot be read as bitsandbytes: ")


def test_an_error_that_is_not_the_reported_one(folder: Path, pico: Path) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        next(row for row in manifest["layers"] if row["name"] == LAYER)["error"] *= 0.99

    change(folder / "loftq.json", edit)
    assert named(folder, pico) == {"loftq.json", LAYER}  # nor is the total then that of the layers


def test_other_embeddings_than_the_sources(folder: Path, pico: Path) -> None:
    name = "model.embed_tokens.weight"
    change_tensors(shard_of(folder, name), lambda tensors: tensors[name][3].mul_(2))
    hash_again(folder)
    assert verify(folder, pico) == [(name, f"differs from {name} of the source in bfloat16")]


def test_another_source(folder: Path, tmp_path: Path) -> None:
    others = {"other weights": pico_llama(), "other shapes": pico_llama(intermediate_size=192)}
    others["other weights"].model.layers[0].self_attn.q_proj.weight.data *= 1.01
    for kind, model in others.items():
        source = save_model(model, tmp_path / kind)
        ((where, what),) = verify(folder, source)
        assert where == str(source)
        assert f"{source} is not the source of this folder, which is " in what


def test_a_source_that_differs_in_what_is_not_quantized(folder: Path, tmp_path: Path) -> None:
    model = pico_llama()
    model.model.norm.weight.data *= 2
    source = save_model(model, tmp_path / "other")
    assert named(folder, source) == {"model.norm.weight", str(source)}


def test_bad_input(folder: Path, pico: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such folder: "):
        verify(tmp_path / "nothing")
    with pytest.raises(
        ArtifactError, match=r"has no loftq\.json: it is not a loftq folder, or the run that wrote it was interr"
    ):
        verify(pico)
    with pytest.raises(SourceError, match="no such folder: "):
        verify(folder, tmp_path / "nothing")


def test_the_command(run: Run, folder: Path, pico: Path) -> None:
    result = run("verify", folder, "--source", pico)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.rstrip().endswith("sound")
    assert f"computed again from {pico}" in result.stdout
    (folder / "tokenizer.json").write_text("{}")
    result = run("verify", folder, "--quiet")
    assert result.exit_code == 1
    assert "differs  tokenizer.json: has 2 bytes, expected" in result.stdout
    assert "1 problem" in result.stdout
    assert result.stderr == ""
    result = run("verify", folder, "--json", "--quiet")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not found["sound"]
    assert [problem["where"] for problem in found["problems"]] == ["tokenizer.json"]
    result = run("verify", folder.parent)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ")
