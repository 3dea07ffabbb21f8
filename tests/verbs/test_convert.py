"""Folders in another format with the same codes. Oracles: a folder that was quantized to that format, and the way back.

Covers: cli/convert.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import hashes
from transformers import AutoModelForCausalLM

import loftq
from loftq.errors import ArtifactError, OptionError, OutputError, UnknownNameError

Run = Callable[..., Any]
OPTIONS: dict[str, Any] = {"rank": 4, "iters": 1, "double_quant": True, "max_shard_size": "100KB", "quiet": True}
SAID = ("README.md", "loftq.json", "loftq_init/adapter_config.json")  # they name the format, the command or the place


@pytest.fixture(scope="module")
def folders(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same start in both formats, in several files."""
    parent = tmp_path_factory.mktemp("formats")
    names = ("bitsandbytes", "bitsandbytes-fsdp")
    return {name: loftq.quantize(str(pico), output=parent / name, format=name, **OPTIONS).folder for name in names}


def weights(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in hashes(folder).items() if name not in SAID}


def test_the_bytes_are_those_of_the_other_format_and_back(folders: dict[str, Path], tmp_path: Path, run: Run) -> None:
    split, back = tmp_path / "split", tmp_path / "back"
    done = run("convert", folders["bitsandbytes"], "--format", "bitsandbytes-fsdp", "--output", split)
    assert done.exit_code == 0, done.stderr
    assert "bitsandbytes-fsdp" in done.stdout
    assert len(list(split.glob("*.safetensors"))) > 1
    assert weights(split) == weights(folders["bitsandbytes-fsdp"])
    assert loftq.convert(split, format="bitsandbytes", output=back).format == "bitsandbytes"
    assert weights(back) == weights(folders["bitsandbytes"])


def test_the_folder_is_whole(folders: dict[str, Path], tmp_path: Path) -> None:
    made = loftq.convert(folders["bitsandbytes"], format="bitsandbytes-fsdp", output=tmp_path / "made").folder
    assert not loftq.verify(made).problems
    manifest, wanted = (json.loads((path / "loftq.json").read_text()) for path in (made, folders["bitsandbytes-fsdp"]))
    for key in ("format", "totals", "notes", "backbone_sha256", "layers", "zero_blocks"):
        assert manifest[key] == wanted[key]
    card = (made / "README.md").read_text()
    assert "bnb_4bit_quant_storage=torch.bfloat16" in card
    assert "\n- bitsandbytes-fsdp\n" in card
    tokens = torch.arange(6, 38).view(2, 16)
    logits = [
        AutoModelForCausalLM.from_pretrained(path).train()(tokens).logits for path in (made, folders["bitsandbytes"])
    ]
    assert torch.equal(*logits)


def test_a_trained_adapter_fits_the_converted_backbone(folders: dict[str, Path], tmp_path: Path) -> None:
    """And no other one."""
    made = loftq.convert(folders["bitsandbytes-fsdp"], format="bitsandbytes", output=tmp_path / "made").folder
    text = tmp_path / "text.txt"
    text.write_text("One two three four five six seven.\n" * 40)
    options: dict[str, Any] = {"task": "clm", "cutoff_len": 32, "max_steps": 1, "quiet": True, "cpu": True}
    loftq.train(str(folders["bitsandbytes-fsdp"]), data=str(text), output=tmp_path / "trained", **options)
    assert loftq.load_qlora(made, tmp_path / "trained") is not None
    with pytest.raises(ArtifactError, match="was trained on"):
        loftq.load_qlora(folders["bitsandbytes"], tmp_path / "trained")


@pytest.mark.parametrize(
    ("name", "format", "error", "problem"),
    [
        ("bitsandbytes", "bitsandbytes", OptionError, "only another format .*: expected bitsandbytes-fsdp"),
        ("bitsandbytes", "loftq", OptionError, "only another format .*: expected bitsandbytes-fsdp"),
        ("packed", "bitsandbytes", OptionError, "no other format has its codes"),
        ("bitsandbytes", "awq", UnknownNameError, "unknown format 'awq'"),
        ("merged", "bitsandbytes", ArtifactError, "is a merged folder"),
    ],
)
def test_folders_and_formats_that_are_refused(
    name: str, format: str, error: type[Exception], problem: str, folders: dict[str, Path], pico: Path, tmp_path: Path
) -> None:
    folder = folders.get(name, tmp_path / name)
    if name == "packed":
        loftq.quantize(str(pico), output=folder, bits=2, rank=4, iters=1, quiet=True)
    if name == "merged":
        loftq.merge(folders["bitsandbytes"], to="bf16", output=folder, quiet=True)
    with pytest.raises(error, match=problem):
        loftq.convert(folder, format=format, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_stays(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputError):
        loftq.convert(folders["bitsandbytes"], format="bitsandbytes-fsdp", output=tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "mine"
