"""An adapter's folder alone, as stock libraries open it: where it was made, after a move, and after `loftq relocate`.

The oracle is peft's own loading of backbone and adapter. transformers reads factors in the dtype of the backbone, so
its logits differ by the rounding of bfloat16.

Covers: cli/relocate.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result
from folders import hashes
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, pipeline

import loftq
from loftq.errors import ArtifactError, LoftQError, OptionError
from loftq.models.loading import guard_cpu

Run = Callable[..., Result]
TOKENS = torch.tensor([[11, 42, 7, 99, 3, 250, 17, 5, 64, 128]])
BFLOAT16 = 0.02  # relative distance of logits; the backbone alone is at 0.1 and more
SUBFOLDER = {"subfolder": "loftq_init"}


@pytest.fixture(scope="module")
def folder(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write to it."""
    output = tmp_path_factory.mktemp("relocate") / "my-model"
    return loftq.quantize(str(pico), output=output, rank=16, iters=2, quiet=True).folder


@pytest.fixture
def moved(folder: Path, tmp_path: Path) -> Path:
    """A copy whose adapter names a place where nothing is."""
    copy = tmp_path / "first" / "my-model"
    shutil.copytree(folder, copy)
    loftq.relocate(copy)
    return copy.rename(tmp_path / "moved")


def logits(model: Any) -> torch.Tensor:
    guard_cpu(model)
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits.float()


def distance(model: Any, expected: torch.Tensor) -> float:
    return float((logits(model) - expected).norm() / expected.norm())


def stock(folder: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return PeftModel.from_pretrained(base, folder, subfolder="loftq_init")


def auto(name: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, **options)


def auto_peft(name: Path) -> Any:
    return AutoPeftModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)


def piped(name: Path, **options: Any) -> Any:
    return pipeline("text-generation", model=str(name), dtype=torch.bfloat16, **options).model


def test_the_folder_alone_lacks_its_adapter(folder: Path) -> None:
    """What the card warns of: nothing is said, and all that loads the adapter too is far from it."""
    expected = logits(stock(folder))
    assert distance(auto(folder), expected) > 5 * BFLOAT16
    assert distance(piped(folder), expected) > 5 * BFLOAT16
    assert "**Always load the adapter too.**" in (folder / "README.md").read_text()


@pytest.mark.parametrize("place", ["folder", "moved"])
def test_one_call_reads_both_wherever_the_folder_is(place: str, request: pytest.FixtureRequest) -> None:
    there = request.getfixturevalue(place)
    expected = logits(stock(there))
    assert distance(auto(there, adapter_kwargs=SUBFOLDER), expected) < BFLOAT16
    assert distance(piped(there, model_kwargs={"adapter_kwargs": SUBFOLDER}), expected) < BFLOAT16
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        again = PeftModel.from_pretrained(auto(there, adapter_kwargs=SUBFOLDER), there, **SUBFOLDER)
    assert distance(again, expected) == 0  # the adapter is replaced, not applied twice


@pytest.mark.filterwarnings("ignore:Unable to fetch remote file:UserWarning")  # of peft, for a folder that is gone
def test_the_adapter_alone_finds_a_backbone_that_was_moved(moved: Path, run: Run) -> None:
    expected = logits(stock(moved))
    for opened in (auto, auto_peft, piped):
        with pytest.raises(OSError, match="first"):
            opened(moved / "loftq_init")
    before = hashes(moved)
    shown = run("relocate", moved)
    assert shown.exit_code == 0, shown.stderr
    assert str(moved.resolve()) in shown.stdout
    assert distance(auto_peft(moved / "loftq_init"), expected) == 0
    for opened in (auto, piped):
        assert distance(opened(moved / "loftq_init"), expected) < BFLOAT16
    assert loftq.verify(moved, quiet=True).sound
    after = hashes(moved)
    assert {name for name in after if after[name] != before.get(name)} == {
        "loftq.json",
        "loftq_init/adapter_config.json",
    }
    again = json.loads(run("relocate", moved / "loftq_init", "--json").stdout)
    assert again == {
        name: str(moved / part) for name, part in (("adapter", "loftq_init"), ("backbone", ""), ("before", ""))
    }
    assert hashes(moved) == after


def test_an_interrupted_relocation_is_finished(moved: Path) -> None:
    """The configuration is written first; until the manifest follows, `verify` names it."""
    manifest = (moved / "loftq.json").read_text()
    loftq.relocate(moved)
    whole = hashes(moved)
    (moved / "loftq.json").write_text(manifest)
    assert not loftq.verify(moved, quiet=True).sound
    loftq.relocate(moved)
    assert hashes(moved) == whole


def test_a_trained_adapter_is_told_where_its_backbone_is(moved: Path, tmp_path: Path, run: Run) -> None:
    trained = Path(shutil.copytree(moved / "loftq_init", tmp_path / "trained"))
    assert "whose backbone is not found" in run("relocate", trained).stderr
    assert run("relocate", trained, "--backbone", moved).exit_code == 0
    assert distance(auto_peft(trained), logits(stock(moved))) == 0
    inside = Path(shutil.copytree(trained, moved / "trained"))  # as `loftq push --adapter` lays it
    assert loftq.relocate(inside).backbone == moved.resolve()


def test_adapters_that_have_a_manifest_of_their_own_stay_whole(pico: Path, folder: Path, tmp_path: Path) -> None:
    """One for the full-precision model, and one for a backbone that was quantized by others."""
    moved = Path(shutil.copytree(pico, tmp_path / "moved"))
    exported = tmp_path / "lora"
    loftq.merge(folder, to="lora", output=exported, quiet=True)
    given = tmp_path / "given"
    loftq.quantize(str(pico), backbone=str(folder), rank=4, output=given, quiet=True)
    for made, adapter in ((exported, exported), (given, given / "loftq_init")):
        result = loftq.relocate(made, backbone=moved)
        assert (result.adapter, result.backbone) == (adapter, moved)
        assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(moved)
        assert loftq.verify(made, quiet=True).sound
    assert json.loads((given / "loftq.json").read_text())["backbone"]["model"] == str(moved)
    with pytest.raises(ArtifactError, match="is a start folder: name one with a backbone and its initial adapter"):
        loftq.config(given, "trl")


def _set(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _edited(moved: Path) -> None:
    _set(moved / "loftq_init", lora_alpha=7)
    loftq.relocate(moved)


def _on_the_hub(moved: Path) -> None:
    trained = Path(shutil.copytree(moved / "loftq_init", moved.parent / "trained"))
    _set(trained, base_model_name_or_path="user/model")
    loftq.relocate(trained)


def _foreign(moved: Path) -> None:
    trained = Path(shutil.copytree(moved / "loftq_init", moved.parent / "trained"))
    _set(trained, r=3)
    loftq.relocate(trained, backbone=moved)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (_edited, ArtifactError, r"adapter_config\.json differs from its hash in loftq\.json"),
        (_on_the_hub, OptionError, "belongs to user/model on the Hub: name a folder of it with --backbone"),
        (_foreign, ArtifactError, "r is 3, but the factors of"),
        (lambda moved: loftq.relocate(moved, backbone=moved), OptionError, "leave it out"),
        (lambda moved: loftq.relocate(moved / "gone"), ArtifactError, "is not a folder"),
        (lambda moved: loftq.relocate(moved / "README.md"), ArtifactError, "is not a folder"),
    ],
)
def test_what_names_no_place_is_refused(
    wrong: Callable[[Path], object], error: type[LoftQError], message: str, moved: Path
) -> None:
    before = hashes(moved / "loftq_init")["adapter_model.safetensors"]
    with pytest.raises(error, match=message):
        wrong(moved)
    assert hashes(moved / "loftq_init")["adapter_model.safetensors"] == before


def test_a_backbone_that_is_no_folder_is_refused(moved: Path, tmp_path: Path, run: Run) -> None:
    trained = Path(shutil.copytree(moved / "loftq_init", tmp_path / "trained"))
    before = hashes(trained)
    refused = run("relocate", trained, "--backbone", "user/model")
    assert refused.exit_code == 2
    assert "--backbone user/model is not a folder" in refused.stderr
    assert hashes(trained) == before
