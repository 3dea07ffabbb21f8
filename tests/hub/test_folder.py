"""Models and adapters by their ids on the Hub, where commands and loaders take folders.

Oracle: what the same command or loader gives for the folder that the Hub serves.

Covers: loftq/hub/names.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import Result
from folders import hashes
from hub import Hub, client_of, serve
from huggingface_hub import constants
from writable_hub import SETTLED

import loftq
from loftq.errors import OptionError, SourceError
from loftq.hub.folder import fetch_adapter, fetch_folder
from loftq.hub.names import repository_of, subfolder_of

Run = Callable[..., Result]
TOKENS = torch.tensor([[11, 42, 7, 99, 3, 250, 17, 5, 64, 128]])
WORDS = ("--prompt", "Why?", "--max-new-tokens", 4)


@pytest.fixture(scope="module")
def here(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as repositories hold them: starts, and adapters that name one of them as their base."""
    folder = tmp_path_factory.mktemp("here")
    starts = {"qlora": {}, "qalora": {"adapter": "qalora", "format": "gptq", "group_size": 32, "zero_point": "integer"}}
    for kind, options in starts.items():
        made = loftq.quantize(str(pico), output=folder / kind, rank=2, iters=1, **options).folder  # type: ignore[arg-type]
        for name, content in SETTLED.items():
            (made / name).write_bytes(content)
    rows = ({"prompt": f"What is {i}+{i}?", "response": f"It is {2 * i}."} for i in range(24))
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = loftq.train(folder / "qlora", data=str(data), output=folder / "trained", max_steps=3, learning_rate=1e-2)
    shutil.copytree(trained.folder, folder / "adapter", ignore=shutil.ignore_patterns("checkpoint-*", "training.json"))
    _set(folder / "adapter", base_model_name_or_path="user/start", revision="v1")
    shutil.copytree(folder / "qlora", folder / "both")
    shutil.copytree(folder / "adapter", folder / "both" / "sums")
    return folder


def _set(adapter: Path, **values: str) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def hub(here: Path, pico: Path, tmp_path: Path) -> Iterator[Hub]:
    """On the branch main of `user/start` lies the bare model; `v1` names the start that was made from it."""
    with serve(Hub()) as served, client_of(served.endpoint, tmp_path / "hf"):
        served.add("user/start", pico)
        served.repos["user/start"].commit(here / "qlora", "v1")
        served.add("user/adapter", here / "adapter")
        served.add("user/both", here / "both")
        served.add("user/gptq", here / "qalora")
        served.add("user/private", here / "qlora", private=True, token="hf_ItsToken")
        yield served


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@pytest.mark.usefixtures("hub")
def test_loaders_take_ids(here: Path) -> None:
    start = logits(loftq.load_qlora(here / "qlora"))
    assert torch.equal(logits(loftq.load_qlora("user/start@v1")), start)
    trained = logits(loftq.load_qlora(here / "qlora", here / "trained"))
    assert not torch.equal(trained, start)
    for names in (("user/start@v1", "user/adapter"), ("user/both", "user/both/sums"), ("user/both", here / "trained")):
        assert torch.equal(logits(loftq.load_qlora(*names)), trained)
    pooled = loftq.load_qalora("user/gptq", is_trainable=False)
    assert torch.equal(logits(pooled), logits(loftq.load_qalora(here / "qalora", is_trainable=False)))


@pytest.mark.usefixtures("hub")
def test_commands_take_ids(here: Path, tmp_path: Path, run: Run) -> None:
    answer = run("generate", here / "trained", *WORDS).stdout
    for name, adapter in (("user/start@v1", "user/adapter"), ("user/both", "user/both/sums")):
        assert run("generate", name, "--adapter", adapter, *WORDS).stdout == answer != ""
    assert run("generate", "user/adapter", *WORDS).stdout == answer
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 6)
    figures = [
        json.loads(run("evaluate", name, "--data", text, "--json").stdout)["models"]
        for name in ("user/adapter", here / "trained")
    ]
    assert figures[0] == figures[1]
    merge = ("--to", "bf16", "--no-check", "--quiet", "--output")
    for name, output in (("user/adapter", "one"), (here / "trained", "two")):
        assert run("merge", name, *merge, tmp_path / output).exit_code == 0
    merged = [hashes(tmp_path / output)["model.safetensors"] for output in ("one", "two")]
    assert merged[0] == merged[1]
    shown = json.loads(run("inspect", "user/start@v1", "--json").stdout)
    assert (shown["name"], shown["kind"]) == ("user/start@v1", "qlora")
    assert run("verify", "user/start@v1", "--quiet").exit_code == 0


@pytest.mark.usefixtures("hub")
def test_a_training_on_a_revision_names_it(here: Path, tmp_path: Path) -> None:
    options = {"data": str(here / "sums.jsonl"), "max_steps": 3, "learning_rate": 1e-2}
    trained = loftq.train("user/start@v1", output=tmp_path / "trained", **options).folder  # type: ignore[arg-type]
    config = json.loads((trained / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("user/start", "v1")
    assert hashes(trained)["adapter_model.safetensors"] == hashes(here / "trained")["adapter_model.safetensors"]
    records = [json.loads((folder / "training.json").read_text()) for folder in (trained, here / "trained")]
    assert records[0]["backbone"]["sha256"] == records[1]["backbone"]["sha256"]


@pytest.mark.usefixtures("hub")
def test_a_revision_of_a_source(pico: Path, tmp_path: Path) -> None:
    made = loftq.quantize("user/start@main", output=tmp_path / "made", rank=2, iters=1).folder
    recorded = json.loads((made / "loftq.json").read_text())["source"]
    assert recorded["model"] == "user/start"
    assert len(recorded["revision"]) == 40
    local = loftq.quantize(str(pico), output=tmp_path / "local", rank=2, iters=1).folder
    assert hashes(made)["model.safetensors"] == hashes(local)["model.safetensors"]


def test_a_folder_comes_first(hub: Hub, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(here / "qlora", tmp_path / "user" / "start@v1")
    shutil.copytree(here / "adapter", tmp_path / "user" / "adapter")
    loftq.load_qlora("user/start@v1", "user/adapter")
    loftq.inspect("user/start@v1")
    assert hub.requests == []


@pytest.mark.usefixtures("hub")
def test_names_that_stand_for_nothing(here: Path, run: Run, tmp_path: Path) -> None:
    for name, message in {
        "user/none": "no model 'user/none' here or on the Hub",
        "user/private": "no model 'user/private' here or on the Hub",
        "user/start@v9": "user/start has no revision 'v9'",
        "user/start@": "user/start@: a branch, a tag or a commit is missing after the @",
        "./none": "no such folder: ./none",
    }.items():
        for command in (
            ("generate", name, *WORDS),
            ("merge", name, "--to", "bf16", "--output", tmp_path / "merged"),
            ("inspect", name),
            ("verify", name),
            ("generate", here / "qlora", "--adapter", name, *WORDS),
        ):
            result = run(*command)
            assert result.exit_code in (1, 2)
            assert message in result.stderr
            assert "Traceback" not in result.stderr
    assert not (tmp_path / "merged").exists()
    with pytest.raises(SourceError, match="no such folder: trained: check the path"):
        fetch_adapter("trained")
    for name, missing in {"user/start": "adapter_config.json", "user/both/other": "other/adapter_config.json"}.items():
        with pytest.raises(SourceError, match=f"{name} on the Hub has no {missing}"):
            fetch_adapter(name)
    with pytest.raises(OptionError, match="--revision v1: user/start@v2 names another revision"):
        repository_of("user/start@v2", "v1")


def test_without_a_network_the_cache_serves(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    before = logits(loftq.load_qlora("user/start@v1", "user/adapter"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert torch.equal(logits(loftq.load_qlora("user/start@v1", "user/adapter")), before)
    with pytest.raises(SourceError, match="cannot download 'user/gptq' from the Hub, and the cache does not hold it"):
        fetch_folder("user/gptq")
    assert len(hub.requests) == asked


def test_folders_in_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert subfolder_of("user/model/a/b@v1") == ("user/model@v1", "a/b")
    for name in ("user/model", "./user/model/a", "~/user/model/a", "/user/model/a", "runs/model/a"):
        assert subfolder_of(name) is None
