"""The folder that a training leaves, as the only name that a command needs. Oracle: the same commands with both names.

Covers: loftq/models/trained_folder.py, loftq/training/adapter_card.py, loftq/training/result.py,
loftq/training/model.py.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result
from folders import hashes
from huggingface_hub import ModelCard
from rows import sums, write_rows

import loftq
from loftq.errors import ArtifactError, OptionError
from loftq.models.trained_folder import with_backbone

Run = Callable[..., Result]
TEXT = "The quick brown fox jumps over the lazy dog. " * 6


@pytest.fixture(scope="module")
def folders(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `my-model` and `trained` in it, and the data. Do not write to it."""
    here = tmp_path_factory.mktemp("one")
    made = loftq.quantize(str(pico), output=here / "my-model", rank=2, iters=1, quiet=True).folder
    data = str(write_rows(here / "sums.jsonl", sums(24)))
    (here / "heldout.txt").write_text(TEXT, encoding="utf-8")
    result = loftq.train(str(made), data=data, output=here / "trained", max_steps=3, learning_rate=1e-2, quiet=True)
    assert result.folder == here / "trained"
    return here


def test_one_name_does_what_two_do(folders: Path, tmp_path: Path, run: Run) -> None:
    backbone, trained, text = folders / "my-model", folders / "trained", folders / "heldout.txt"
    words = ("--prompt", "Why?", "--max-new-tokens", 4)
    both = run("generate", backbone, "--adapter", trained, *words)
    assert run("generate", trained, *words).stdout == both.stdout != ""
    checkpoint = loftq.generate(str(trained / "checkpoint-3"), "Why?", max_new_tokens=4)
    assert checkpoint == loftq.generate(str(trained), "Why?", max_new_tokens=4)
    measured = [
        json.loads(run("evaluate", *names, "--data", text, "--json").stdout)
        for names in ((trained,), (backbone, "--adapter", trained))
    ]
    assert measured[0] == measured[1]
    assert list(measured[0]["models"]) == ["trained"]
    merge = ("--to", "bf16", "--no-check", "--quiet", "--output")
    assert run("merge", trained, *merge, tmp_path / "one").exit_code == 0
    assert run("merge", backbone, "--adapter", trained, *merge, tmp_path / "two").exit_code == 0
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    refused = run("generate", trained, "--adapter", trained, *words)
    assert refused.exit_code == 2
    assert "is the folder of an adapter too: leave the option out" in refused.stderr


def test_both_folders_may_move_together(folders: Path, tmp_path: Path) -> None:
    """The old place is gone, or another model has taken it, which the recorded hash tells."""
    there = tmp_path / "there"
    shutil.copytree(folders, there)
    config = json.loads((there / "trained" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone" / "my-model")
    (there / "trained" / "adapter_config.json").write_text(json.dumps(config))
    record = json.loads((there / "trained" / "training.json").read_text())
    assert record["backbone"]["relative"] == "../my-model"
    record["backbone"]["model"] = config["base_model_name_or_path"]
    (there / "trained" / "training.json").write_text(json.dumps(record))
    assert with_backbone(str(there / "trained")) == (str(there / "my-model"), str(there / "trained"))
    assert loftq.generate(str(there / "trained"), "x", max_new_tokens=2)
    other = tmp_path / "gone" / "my-model"
    shutil.copytree(there / "my-model", other)
    manifest = json.loads((other / "loftq.json").read_text()) | {"backbone_sha256": "0" * 64}
    (other / "loftq.json").write_text(json.dumps(manifest))
    assert with_backbone(str(there / "trained"))[0] == str(there / "my-model")
    shutil.rmtree(other)
    shutil.rmtree(there / "my-model")
    with pytest.raises(ArtifactError, match=r"whose backbone is not found \(looked for: .*gone.*my-model.*there.*my-m"):
        with_backbone(str(there / "trained"))
    (there / "trained" / "adapter_config.json").unlink()
    with pytest.raises(ArtifactError, match="holds a training that is not finished: finish it with `loftq train"):
        with_backbone(str(there / "trained"))


def test_a_name_on_the_hub_stays_a_name(folders: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(folders / "my-model" / "loftq_init", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "user/model"}))
    assert with_backbone(str(adapter)) == ("user/model", str(adapter))
    assert with_backbone("user/model", str(adapter)) == ("user/model", str(adapter))
    with pytest.raises(OptionError, match="--adapter x: "):
        with_backbone(str(adapter), "x")


def test_inspect_shows_the_training(folders: Path, run: Run) -> None:
    record = json.loads((folders / "trained" / "training.json").read_text())
    text = run("inspect", folders / "trained").stdout
    loss = record["result"]["train_loss"]
    for line in ("3 steps on 23 examples", f"train loss     {loss:.4f}", "sums.jsonl (rows ", "learning rate 0.01"):
        assert line in text
    shown = json.loads(run("inspect", folders / "trained", "--json").stdout)["training"]
    assert shown["rows"] == record["rows"]
    assert shown["result"]["evaluation"] == record["result"]["evaluation"]


def test_the_card_says_what_was_trained(folders: Path) -> None:
    """Oracle: training.json; the Hub client reads the metadata."""
    record = json.loads((folders / "trained" / "training.json").read_text())
    card = ModelCard.load(folders / "trained" / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.tags == ["loftq", "lora", "qlora"]
    for text in ("`my-model`", "`pico-llama`", "`sums.jsonl`", record["rows"]["data"], "| learning rate | 0.01 |"):
        assert text in card.text
    losses = [entry["eval_loss"] for entry in record["history"] if "eval_loss" in entry]
    assert all(f"| {loss:.4f} |" in card.text for loss in losses)
    assert 'loftq.load_qlora("my-model", "trained")' in card.text
    assert str(folders) not in card.text
    assert "More Information Needed" not in card.text


def test_training_ends_with_what_comes_next(
    folders: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line but the server's is a command that runs as it stands."""
    out = tmp_path / "out"
    done = run("train", folders / "my-model", "--data", folders / "sums.jsonl", "--output", out, "--max-steps", 1)
    assert done.exit_code == 0, done.stderr
    assert "the warm-up of 1 step is shortened to 0: the whole run has 1 step" in done.stderr
    assert "23 examples to train on, 1 to evaluate on: " in done.stderr
    lines = done.stdout.partition("Next:\n")[2].splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["loftq", "chat"],
        ["loftq", "evaluate"],
        ["loftq", "merge"],
        ["vllm", "serve"],
    ]
    before = (folders / "my-model" / "loftq_init" / "adapter_model.safetensors").read_bytes()
    assert (out / "adapter_model.safetensors").read_bytes() != before  # the only step has the full rate
    monkeypatch.setattr("sys.stdin", io.StringIO("why\n"))
    for line in lines[:3]:
        words = line.replace("FILE", str(folders / "heldout.txt")).split()[1:]
        assert run(*words, *(("--no-check",) if words[0] == "merge" else ())).exit_code == 0
    assert run("evaluate", f"{out}-merged", "--data", folders / "heldout.txt").exit_code == 0
