"""Pushing: the real huggingface_hub client before a Hub on this machine.

The oracle for what was pushed is what the Hub holds, and what stock transformers and peft load from it by its id; for
what was sent, the Hub's record.

Covers: cli/push.py, loftq/hub/destination.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Result
from hub import Answer, client_of, serve
from huggingface_hub import ModelCard, constants, utils
from peft import PeftConfig
from processes import run_python, start_python
from transformers import AutoModelForCausalLM
from writable_hub import SETTLED, WritableHub

import loftq
from loftq.errors import HubError, LoftQError
from loftq.models.loading import guard_cpu

TOKEN, READER, STRANGER = "hf_TheTokenThatWrites", "hf_TheTokenThatReads", "hf_TheTokenOfSomebodyElse"
ADAPTER = "loftq_init/adapter_config.json"
Run = Callable[..., Result]
# the client's way of sending without Xet, and its transport, between themselves
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    """A Hub without repositories, with the client and an empty cache before it; attempts are repeated at once."""
    monkeypatch.setattr(utils._http, "time", SimpleNamespace(sleep=lambda _: None))
    with serve(WritableHub(tmp_path / "served")) as served, client_of(served.endpoint, tmp_path / "hf"):
        served.join(TOKEN, "alice", orgs=("acme",))
        served.join(READER, "alice", role="read")
        served.join(STRANGER, "bob")
        yield served


@pytest.fixture(scope="module")
def made(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in four shards, made from a folder. Do not write to it."""
    output = tmp_path_factory.mktemp("made") / "pico-4bit"
    return loftq.quantize(str(pico), rank=4, iters=1, max_shard_size="30KB", output=output, quiet=True).folder


@pytest.fixture(scope="module")
def other(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with another backbone of the same model, in one shard. Do not write to it."""
    output = tmp_path_factory.mktemp("made") / "pico-plain"
    return loftq.quantize(str(pico), rank=4, iters=1, double_quant=True, output=output, quiet=True).folder


@pytest.fixture(scope="module")
def trained(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as peft saves it after training on `made`: other weights, another configuration."""
    folder = tmp_path_factory.mktemp("trained") / "gsm8k"
    model = loftq.load_qlora(made)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    model.save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def error_of(result: Result, exit_code: int = 1) -> str:
    """The one line that a refused command prints."""
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert "Traceback" not in result.stderr
    last = result.stderr.rstrip("\n").rpartition("\n")[2]
    return "Error: " + last.partition("Error: ")[2]  # after what the client shows of an upload


def written(hub: WritableHub) -> list[str]:
    """The requests by which a client changes something."""
    asked = {"/preupload/", "/api/validate-yaml"}
    return [
        r.path for r in hub.requests if r.method not in ("GET", "HEAD") and not any(part in r.path for part in asked)
    ]


def environment(hub: WritableHub, home: Path, token: str) -> dict[str, str]:
    """That of a process of its own before the Hub."""
    given = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    return {**os.environ, **given, "NO_PROXY": "127.0.0.1"}


def in_a_new_process(code: str, hub: WritableHub, home: Path, token: str = "") -> str:
    """What a process that has only an endpoint, a token and an empty cache prints."""
    given = environment(hub, home, token)
    ended = run_python(code, level="torch", env=given, cwd=home)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


# What arrives


def test_what_was_pushed_loads_by_its_id(made: Path, trained: Path, hub: WritableHub, run: Run, tmp_path: Path) -> None:
    """Oracle: the printed lines, run by stock libraries with an empty cache, give the logits of the local folder."""
    before = contents(made)
    options = ("--private", "--token", TOKEN, "--adapter", trained, "--json")
    result = run("push", made, "alice/pico", *options)
    assert result.exit_code == 0, result.stderr
    assert contents(made) == before
    report = json.loads(result.stdout)
    code = f"""
import sys, torch
{report["lines"]}
ids = torch.arange(12)[None]
pushed = model.eval()(ids).logits
MODEL_DIR = {str(made)!r}
local = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
local = PeftModel.from_pretrained(local, {str(trained)!r}).eval()
print(torch.equal(pushed, local(ids).logits), "loftq" in sys.modules)
begun = AutoModelForCausalLM.from_pretrained("alice/pico")
begun = PeftModel.from_pretrained(begun, "alice/pico", subfolder="loftq_init")
print(torch.equal(begun.eval()(ids).logits, pushed))
"""
    (tmp_path / "clean").mkdir()
    assert in_a_new_process(code, hub, tmp_path / "clean", TOKEN).split() == ["True", "False", "False"]


def test_the_upload_names_the_repository_and_no_place_of_this_machine(
    made: Path, pico: Path, hub: WritableHub, run: Run
) -> None:
    assert run("push", made, "alice/pico", "--token", TOKEN).exit_code == 0
    pushed = hub.files("alice/pico")
    assert PeftConfig.from_peft_type(**json.loads(pushed[ADAPTER])).base_model_name_or_path == "alice/pico"
    listed = json.loads((made / "loftq.json").read_text())["files"]
    assert set(pushed) == {*listed, "loftq.json", *SETTLED}
    changed = {name for name in pushed.keys() - SETTLED if pushed[name] != (made / name).read_bytes()}
    assert changed == {ADAPTER, "README.md", "loftq.json"}
    for name, content in pushed.items():
        for place in (made, made.parent, pico, pico.parent):
            assert str(place).encode() not in content, name
    card = pushed["README.md"].decode()
    assert 'MODEL_DIR = "alice/pico"\n' in card
    assert '"..."' not in card
    assert "loftq.load_qlora(huggingface_hub.snapshot_download(MODEL_DIR))" in card


def test_what_is_downloaded_is_a_folder_of_ours(made: Path, hub: WritableHub, run: Run, tmp_path: Path) -> None:
    """Oracle: hashes of the files, and our own loader."""
    assert run("push", made, "alice/pico", "--token", TOKEN).exit_code == 0
    folder = tmp_path / "downloaded"
    for name, content in hub.files("alice/pico").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    listed = json.loads((folder / "loftq.json").read_text())["files"]
    for name, entry in listed.items():
        content = (folder / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    model = loftq.load_qlora(folder, is_trainable=False)
    assert model.peft_config["default"].base_model_name_or_path == "alice/pico"
    in_one_call = AutoModelForCausalLM.from_pretrained(
        "alice/pico", dtype=torch.bfloat16, token=TOKEN, adapter_kwargs={"subfolder": "loftq_init"}
    )
    guard_cpu(in_one_call)
    tokens = torch.arange(20).view(2, 10)
    expected = model.eval()(tokens).logits
    found = in_one_call.eval()(tokens).logits
    assert float((found - expected).norm() / expected.norm()) < 0.02  # its factors are in bfloat16


def test_paths_in_files_of_others_stay_behind(pico: Path, hub: WritableHub, run: Run, tmp_path: Path) -> None:
    """In a source's configurations, a card and an adapter that name places; oracle: `verify` of what is downloaded."""
    home = "/home/somebody/models"
    source = Path(shutil.copytree(pico, tmp_path / "source"))
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        config = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps({**config, key: f"{home}/pico", "eos_token": "</s>"}))
    text = tmp_path / "text.txt"
    text.write_text("word " * 9000)
    with_text = {"calibration": str(text), "calibration_tokens": 4096, "sequence_length": 64, "refine": 0}
    folder = loftq.quantize(str(source), rank=4, iters=1, output=tmp_path / "out", quiet=True, **with_text).folder
    card = folder / "README.md"
    card.write_text(card.read_text() + f"\nMade from {home}/pico.\n")
    trained = Path(shutil.copytree(folder / "loftq_init", tmp_path / "mine"))
    config = json.loads((trained / "adapter_config.json").read_text())
    (trained / "adapter_config.json").write_text(json.dumps({**config, "eva_config": {"cache": f"{home}/x"}}))
    done = run("push", folder, "alice/pico", "--token", TOKEN, "--adapter", trained)
    assert done.exit_code == 0, done.stderr
    downloaded = tmp_path / "downloaded"
    for name, content in hub.files("alice/pico").items():
        assert home.encode() not in content, name
        assert str(tmp_path).encode() not in content, name
        (downloaded / name).parent.mkdir(parents=True, exist_ok=True)
        (downloaded / name).write_bytes(content)
    assert json.loads((downloaded / "config.json").read_text())["_name_or_path"] == "pico"
    verified = run("verify", downloaded)
    assert verified.exit_code == 0, verified.stdout + verified.stderr


def test_a_card_that_was_edited_keeps_its_words(made: Path, hub: WritableHub, run: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "edited"))
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card + "\nOur words.\n")
    (folder / "notes.txt").write_text("not listed, so not for others")
    assert run("push", folder, "alice/pico", "--token", TOKEN).exit_code == 0
    pushed = hub.files("alice/pico")
    assert pushed["README.md"].endswith(b"\nOur words.\n")
    assert b'MODEL_DIR = "alice/pico"' in pushed["README.md"]
    assert "notes.txt" not in pushed


@pytest.mark.parametrize("old", ["nf4", "gptq", "pushed"])
def test_a_card_of_an_older_version_names_the_repository(
    old: str, made: Path, hub: WritableHub, run: Run, tmp_path: Path
) -> None:
    """It has no marks around the part about loading. Oracle: the card as loftq 0.1.0 wrote it."""
    card = (Path(__file__).parent.parent / "artifacts" / "old_cards" / f"{old}.md").read_text()
    before, after = card[: card.index("```python")], card[card.index("\n\n- The adapter belongs") :]
    folder = Path(shutil.copytree(made, tmp_path / "old"))
    (folder / "README.md").write_text(card)
    assert run("push", folder, "alice/pico", "--token", TOKEN, "--revision", "new").exit_code == 0
    pushed = hub.files("alice/pico", "new")["README.md"].decode()
    assert pushed.startswith(before)
    assert pushed.endswith(after)
    section = pushed.removeprefix(before).removesuffix(after)
    assert 'MODEL_DIR = "alice/pico"\n' in section
    assert section.count('revision="new"') == 3  # the backbone's, the adapter's, and of loftq's own line
    assert "trial" not in section  # the branch to which one of these cards had gone before
    assert section.count("```") == 4  # Python, and the commands of servers
    assert "hf download alice/pico --revision new --local-dir pico\nvllm serve pico --enable-lora" in section
    assert '"..."' not in pushed


def test_a_trained_adapter_lies_beside_in_a_folder_of_its_own(
    made: Path, trained: Path, hub: WritableHub, run: Run
) -> None:
    assert run("push", made, "alice/pico", "--token", TOKEN).exit_code == 0
    more = ("--adapter", trained, "--subfolder", "math/gsm8k")
    result = run("push", made, "alice/pico", "--token", TOKEN, *more)
    assert 'subfolder="math/gsm8k")' in result.stdout
    pushed = hub.files("alice/pico")
    weights = (trained / "adapter_model.safetensors").read_bytes()
    assert pushed["math/gsm8k/adapter_model.safetensors"] == weights
    assert json.loads(pushed["math/gsm8k/adapter_config.json"])["base_model_name_or_path"] == "alice/pico"
    assert 'subfolder="math/gsm8k")' in pushed["math/gsm8k/README.md"].decode()
    sent = [line for r in hub.requests if "/commit/" in r.path for line in r.body.splitlines()]
    assert len(sent) == len(json.loads((made / "loftq.json").read_text())["files"]) + 1 + 3 + 2  # and two headers


@pytest.mark.parametrize(
    ("name", "option"), [("loftq_init", "--subfolder"), ("../up", "--subfolder"), ("README.md", "--subfolder")]
)
def test_an_adapters_folder_is_its_own(
    name: str, option: str, made: Path, trained: Path, hub: WritableHub, run: Run
) -> None:
    result = run("push", made, "alice/pico", "--token", TOKEN, "--adapter", trained, option, name)
    assert error_of(result, 2).startswith(
        f"Error: --subfolder {name}: expected a name like gsm8k that the repository does not use yet"
    )
    assert "--adapter" in error_of(run("push", made, "alice/pico", "--token", TOKEN, option, "x"), 2)
    assert hub.requests == []


def test_an_adapter_of_another_backbone_is_refused(
    other: Path, made: Path, trained: Path, hub: WritableHub, run: Run
) -> None:
    result = run("push", other, "alice/pico", "--token", TOKEN, "--adapter", trained)
    assert f"was trained on {made}" in error_of(result)
    assert hub.requests == []


@pytest.mark.parametrize("target", ["bf16", "lora"])
def test_what_was_merged_is_pushed_with_the_lines_that_serve_it(
    target: str, made: Path, trained: Path, pico: Path, hub: WritableHub, run: Run, tmp_path: Path
) -> None:
    """Oracles: the metadata as the Hub's client reads them, `verify` of what is downloaded, the paths of this test."""
    card = made / "README.md"
    text = card.read_text()
    try:
        card.write_text(text.replace("---\n", "---\nlicense: mit\n", 1))
        loftq.merge(made, trained, to=target, output=tmp_path / "out", quiet=True, check=False)
    finally:
        card.write_text(text)
    result = run("push", tmp_path / "out", "alice/merged", "--token", TOKEN)
    assert result.exit_code == 0, result.stderr
    serves = "vllm serve alice/merged\n" if target == "bf16" else "vllm serve BASE --enable-lora --max-lora-rank 8 "
    assert serves in result.stdout
    pushed = hub.files("alice/merged")
    found = ModelCard(pushed["README.md"].decode())
    assert (found.data.license, found.data.tags) == ("mit", ["loftq", target])
    assert serves in found.text
    assert "MODEL_DIR" not in found.text
    for name, content in pushed.items():
        for place in (made, made.parent, pico.parent, tmp_path):
            assert str(place).encode() not in content, name
        (tmp_path / "downloaded" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "downloaded" / name).write_bytes(content)
    assert run("verify", tmp_path / "downloaded").exit_code == 0
    more = ("--adapter", trained)
    assert "is merged, so adapters do not belong to it" in error_of(
        run("push", tmp_path / "out", "alice/merged", "--token", TOKEN, *more), 2
    )


# Branches, tags, pull requests


def test_a_branch_is_made_and_named_in_what_loads_it(
    made: Path, other: Path, hub: WritableHub, run: Run, tmp_path: Path
) -> None:
    """Oracle: stock libraries load the branch's own weights by the printed lines."""
    assert run("push", made, "alice/pico", "--token", TOKEN).exit_code == 0
    main = hub.files("alice/pico")
    result = run("push", other, "alice/pico", "--token", TOKEN, "--revision", "plain", "--tag", "v1", "--json")
    report = json.loads(result.stdout)
    assert report["removed"] == sorted(name for name in main if name.startswith("model"))
    assert hub.files("alice/pico") == main
    pushed = hub.files("alice/pico", "plain")
    assert set(pushed) == {*json.loads((other / "loftq.json").read_text())["files"], "loftq.json", *SETTLED}
    assert hub.repos["alice/pico"].refs["v1"] == report["commit"] == hub.repos["alice/pico"].refs["plain"]
    assert report["lines"] in pushed["README.md"].decode()
    assert report["lines"].count('revision="plain"') == 2
    assert json.loads(pushed[ADAPTER])["revision"] == "plain"
    code = f"""{report["lines"]}
local = AutoModelForCausalLM.from_pretrained({str(other)!r})
local = PeftModel.from_pretrained(local, {str(other)!r}, subfolder="loftq_init", is_trainable=True)
ids = torch.arange(12)[None]
print(torch.equal(model.eval()(ids).logits, local.eval()(ids).logits))
print(model.peft_config["default"].revision)"""
    (tmp_path / "clean").mkdir()
    assert in_a_new_process(code, hub, tmp_path / "clean").split() == ["True", "plain"]


def test_a_tag_is_of_one_commit(made: Path, trained: Path, hub: WritableHub, run: Run) -> None:
    command = ("push", made, "alice/pico", "--token", TOKEN, "--tag", "v1")
    first = json.loads(run(*command, "--json").stdout)
    again = json.loads(run(*command, "--json").stdout)
    assert first["commit"] == again["commit"] == hub.repos["alice/pico"].refs["v1"]
    said = f"--tag v1 names another commit of alice/pico ({first['commit']}): choose another tag"
    error = error_of(run(*command, "--adapter", trained))
    moved = hub.repos["alice/pico"].refs["main"]
    assert error == f"Error: the files were pushed as commit {moved}, but {said}"
    hub.requests.clear()
    assert error_of(run(*command)) == f"Error: {said}"
    assert written(hub) == []


def test_a_pull_request_leaves_the_branch_as_it_is(made: Path, other: Path, hub: WritableHub, run: Run) -> None:
    assert run("push", made, "alice/pico", "--token", TOKEN).exit_code == 0
    before = hub.files("alice/pico")
    result = run("push", other, "alice/pico", "--token", STRANGER, "--create-pr")
    assert result.exit_code == 0, result.stderr
    assert f"pull request  {hub.endpoint}/alice/pico/discussions/2" in result.stdout
    assert hub.files("alice/pico") == before
    proposed = hub.files("alice/pico", "refs/pr/2")
    assert proposed["model.safetensors"] == (other / "model.safetensors").read_bytes()
    assert "model.safetensors.index.json" not in proposed
    for option in ("--revision", "--tag"):
        result = run("push", other, "alice/pico", "--token", STRANGER, "--create-pr", option, "v1")
        assert f"--create-pr and {option} exclude each other" in error_of(result, 2)


# What is there already


def test_pushed_again_nothing_is_sent_twice(made: Path, hub: WritableHub, run: Run) -> None:
    command = ("push", made, "alice/pico", "--token", TOKEN, "--json")
    first = json.loads(run(*command).stdout)
    sent = list(hub.upload.puts)
    assert json.loads(run(*command).stdout)["commit"] == first["commit"]
    assert hub.upload.puts == sent
    assert len(hub.repos["alice/pico"].commits) == 2


def test_another_backbone_is_replaced_only_when_asked(made: Path, other: Path, hub: WritableHub, run: Run) -> None:
    assert run("push", made, "alice/pico", "--token", TOKEN).exit_code == 0
    before = hub.files("alice/pico")
    command = ("push", other, "alice/pico", "--token", TOKEN)
    hub.requests.clear()
    assert "holds a loftq model with another backbone" in error_of(run(*command))
    assert written(hub) == []
    result = run(*command, "--overwrite")
    assert "removed" in result.stdout
    after = hub.files("alice/pico")
    assert after["model.safetensors"] == (other / "model.safetensors").read_bytes()
    assert not {name for name in before.keys() - after.keys() if not name.startswith("model")}
    assert "model.safetensors.index.json" not in after


def test_another_model_is_never_mingled_with(made: Path, pico: Path, hub: WritableHub, run: Run) -> None:
    hub.add("alice/pico", pico, token=TOKEN)
    for more in ([], ["--overwrite"], ["--revision", "main"]):
        error = error_of(run("push", made, "alice/pico", "--token", TOKEN, *more))
        assert "holds another model (chat_template.jinja, config.json, " in error
        assert "--revision" in error
    assert written(hub) == []
    assert run("push", made, "alice/pico", "--token", TOKEN, "--revision", "4bit").exit_code == 0
    assert set(hub.files("alice/pico", "4bit")) == {*contents(made)}


@pytest.mark.usefixtures("hub")
def test_private_is_not_promised_for_what_is_public(made: Path, run: Run) -> None:
    assert run("push", made, "alice/pico", "--token", TOKEN).exit_code == 0
    error = error_of(run("push", made, "alice/pico", "--token", TOKEN, "--private"))
    assert error.startswith(
        "Error: alice/pico exists already and is public, and --private only applies to a new repository"
    )


def test_a_private_repository_is_made_for_an_organization(made: Path, hub: WritableHub, run: Run) -> None:
    result = run("push", made, "acme/pico", "--token", TOKEN, "--private")
    assert f"{hub.endpoint}/acme/pico, private" in result.stdout
    assert hub.repos["acme/pico"].private
    again = run("push", made, "acme/pico", "--token", TOKEN, "--private")
    assert again.exit_code == 0, again.stderr


# Uploads that break off


def test_an_upload_that_broke_off_goes_on(made: Path, hub: WritableHub, run: Run) -> None:
    weights = [name for name in contents(made) if name.endswith(".safetensors")]
    assert len(weights) > 4
    hub.upload.breaks_after = 2
    command = ("push", made, "alice/pico", "--token", TOKEN)
    error = error_of(run(*command))
    assert "500 Internal Server Error" in error
    assert f"{hub.endpoint}/lfs/" in error
    assert "Run the same command again to continue" in error
    assert "X-Signature" not in error
    assert set(hub.files("alice/pico")) == set(SETTLED)  # nobody sees a part
    hub.upload.breaks_after = None
    assert run(*command).exit_code == 0
    assert len(hub.upload.puts) == len(set(hub.upload.puts)) == len(weights)
    assert {name: hub.files("alice/pico")[name] for name in weights} == {
        name: content for name, content in contents(made).items() if name in weights
    }


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_an_upload_that_was_interrupted_goes_on(
    number: signal.Signals, made: Path, hub: WritableHub, run: Run, tmp_path: Path
) -> None:
    """Oracle: what the Hub was sent in both runs, counted."""
    (tmp_path / "clean").mkdir()
    code = "import signal, sys; from loftq_cli.main import main; "
    code += "signal.signal(signal.SIGINT, signal.default_int_handler); main(sys.argv[1:])"  # a shell may ignore it
    words = ("push", made, "alice/pico", "--quiet")
    process = start_python(code, *words, level="torch", env=environment(hub, tmp_path / "clean", TOKEN))
    hub.upload.breaks_after = 2
    hub.upload.meanwhile = lambda: (process.send_signal(number), process.wait(60))
    _, said = process.communicate()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert said.strip() == "interrupted: finished work is kept, run the same command again to continue"
    assert set(hub.files("alice/pico")) == set(SETTLED)
    hub.upload.breaks_after = None
    sent = list(hub.upload.puts)
    assert run("push", made, "alice/pico", "--token", TOKEN).exit_code == 0
    weights = [name for name in contents(made) if name.endswith(".safetensors")]
    assert hub.upload.puts[:2] == sent
    assert len(hub.upload.puts) == len(set(hub.upload.puts)) == len(weights)


@pytest.mark.parametrize("revision", [[], ["--revision", "new"]])
def test_a_commit_that_fails_goes_on(
    revision: list[str], made: Path, pico: Path, hub: WritableHub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    if revision:
        hub.add("alice/pico", pico, token=TOKEN)
    answer, fails = hub.answer, [True]
    monkeypatch.setattr(
        hub,
        "answer",
        lambda request: Answer(502, {}) if fails and fails.pop() and _ends(request.path) else answer(request),
    )

    def _ends(path: str) -> bool:
        found = f"/{'branch' if revision else 'commit'}/" in path
        if not found:
            fails.append(True)
        return found

    command = ("push", made, "alice/pico", "--token", TOKEN, *revision)
    assert "Run the same command again to continue" in error_of(run(*command))
    sent = list(hub.upload.puts)
    assert run(*command).exit_code == 0
    assert hub.upload.puts == sent
    assert set(contents(made)) <= set(hub.files("alice/pico", *revision[1:]))


# What is refused


def test_a_tokens_rights_are_checked_before_anything_is_sent(made: Path, hub: WritableHub, run: Run) -> None:
    refusals = {
        ("alice/pico", None): "no Hub token: log in with `hf auth login`, or pass --token",
        ("alice/pico", READER): "the token of alice may only read: create one with write access at ",
        ("alice/pico", "hf_unknown"): "the Hub refuses the token: log in again with `hf auth login`, or pass another",
        ("carol/pico", TOKEN): "the token belongs to alice, who cannot write for carol: push to alice/pico (it may "
        "write for: alice, acme)",
    }
    for (repo, token), said in refusals.items():
        given = [] if token is None else ["--token", token]
        assert error_of(run("push", made, repo, *given)).startswith(f"Error: {said}")
    assert written(hub) == []
    assert hub.repos == {}


@pytest.mark.parametrize("made_before", [False, True])
def test_what_the_hub_forbids_is_said_in_its_words(made_before: bool, made: Path, hub: WritableHub, run: Run) -> None:
    if made_before:
        hub.add("acme/pico", hub.root, token=TOKEN)
        hub.root.mkdir(exist_ok=True)
    hub.forbidden.add("acme/pico")
    error = error_of(run("push", made, "acme/pico", "--token", TOKEN))
    said = "you do not have write permission" if made_before else "You don't have the rights to create a model"
    assert error.startswith(f"Error: the token has no permission for this on acme/pico: {said}")
    assert error.endswith("pass a --token with write access")
    assert hub.upload.puts == []


@pytest.mark.parametrize("name", ["alice/pi co", "alice/pico/more", "pico", "alice/..pico", "", "alice/", "/pico"])
def test_an_id_that_is_none(name: str, made: Path, hub: WritableHub, run: Run) -> None:
    assert f"{name!r} is not a valid repository id" in error_of(run("push", made, name, "--token", TOKEN), 2)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("option", "name"), [("--revision", "a..b"), ("--tag", "v 1"), ("--tag", ""), ("--revision", "0" * 40)]
)
def test_a_branch_and_a_tag_that_are_none(option: str, name: str, made: Path, hub: WritableHub, run: Run) -> None:
    error = error_of(run("push", made, "alice/pico", "--token", TOKEN, option, name), 2)
    assert error.startswith(f"Error: {option} {name}")
    assert hub.requests == []


def test_an_incomplete_folder_is_not_pushed(made: Path, pico: Path, hub: WritableHub, run: Run, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(made, tmp_path / "cut"))
    with (cut / "model-00002-of-00004.safetensors").open("r+b") as file:
        file.truncate(100)
    lacking = Path(shutil.copytree(made, tmp_path / "lacking"))
    (lacking / "loftq_init/adapter_model.safetensors").unlink()
    expected = {
        cut: "model-00002-of-00004.safetensors has 100 bytes, expected",
        lacking: "adapter_model.safetensors is missing: loftq.json lists it",
        pico: "has no loftq.json",
        tmp_path / "none": "is not a folder",
    }
    for folder, said in expected.items():
        assert said in error_of(run("push", folder, "alice/pico", "--token", TOKEN))
    assert hub.requests == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "merged"}, "was merged by an older loftq, without a card: merge it again"),
        ({"files": {}}, "is damaged: it does not list loftq_init/adapter_config.json"),
        ({"more": "../secret"}, "lists '../secret', which lies outside its folder"),
        ({"more": "/etc/hostname"}, "lists '/etc/hostname', which lies outside its folder"),
    ],
)
def test_a_manifest_that_is_not_one_to_push(
    change: dict[str, Any], said: str, made: Path, hub: WritableHub, run: Run, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "changed"))
    (tmp_path / "secret").write_text("nobody else's")
    manifest = json.loads((folder / "loftq.json").read_text())
    if "more" in change:
        manifest["files"][change["more"]] = {"bytes": 1, "sha256": ""}
    else:
        manifest |= change
    (folder / "loftq.json").write_text(json.dumps(manifest))
    assert said in error_of(run("push", folder, "alice/pico", "--token", TOKEN))
    assert hub.requests == []


def test_no_hub(made: Path, run: Run, tmp_path: Path) -> None:
    with serve(WritableHub(tmp_path / "served")) as gone:
        pass
    with client_of(gone.endpoint, tmp_path / "hf"):
        error = error_of(run("push", made, "alice/pico", "--token", TOKEN))
    assert error.startswith("Error: cannot reach alice/pico on the Hub: ")


# What is shown, and what is not


def test_a_dry_run_sends_nothing(made: Path, hub: WritableHub, run: Run) -> None:
    result = run("push", made, "alice/pico", "--token", TOKEN, "--dry-run")
    assert "nothing was sent" in result.stdout
    assert 'MODEL_DIR = "alice/pico"' in result.stdout
    assert {request.method for request in hub.requests} == {"GET"}
    assert hub.repos == {}


@pytest.mark.parametrize("way", ["option", "environment", "login"])
def test_the_token_is_shown_and_written_nowhere(
    way: str,
    made: Path,
    hub: WritableHub,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if way == "environment":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    given = ["--token", TOKEN] if way == "option" else []
    place = Path(constants.HF_TOKEN_PATH)
    if way == "login":
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(TOKEN)
    hub.upload.breaks_after = 1
    results = []
    with caplog.at_level(logging.DEBUG):
        results.append(run("push", made, "alice/pico", "--private", *given))
        with pytest.raises(LoftQError) as caught:
            run("push", made, "alice/pico", "--private", *given, "--debug")
        hub.upload.breaks_after = None
        results += [run("push", made, "alice/pico", "--private", *given, *more) for more in ([], ["--json"])]
    assert [result.exit_code for result in results] == [1, 0, 0]
    said = [part for result in results for part in (result.stdout, result.stderr)]
    said += [caplog.text, "".join(traceback.format_exception(caught.value))]
    assert not [text for text in said if TOKEN in text]
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p != place and TOKEN.encode() in p.read_bytes()]


def test_a_token_that_no_header_holds_is_not_shown(made: Path, hub: WritableHub, run: Run) -> None:
    for token in (f"{TOKEN}\nand more", f"{TOKEN}ö"):
        assert TOKEN not in error_of(run("push", made, "alice/pico", "--token", token), 2)
    assert hub.requests == []


def test_python_api_pushes_the_same(made: Path, hub: WritableHub) -> None:
    report = loftq.push(made, "alice/pico", token=TOKEN, revision="main")
    assert report.commit == hub.repos["alice/pico"].refs["main"]
    assert ModelCard(hub.files("alice/pico")["README.md"].decode()).data.tags[0] == "loftq"
    with pytest.raises(HubError, match="may only read"):
        loftq.push(made, "alice/pico", token=READER)


# Quantized and pushed


def test_quantize_pushes_what_it_made(pico: Path, hub: WritableHub, run: Run, tmp_path: Path) -> None:
    command = ("quantize", pico, "--rank", 4, "--iter", 1, "--quiet", "--token", TOKEN, "--output", tmp_path / "out")
    result = run(*command, "--push", "alice/pico", "--private")
    assert result.exit_code == 0, result.stderr
    assert f"{hub.endpoint}/alice/pico, commit {hub.repos['alice/pico'].refs['main']}" in result.stdout
    assert 'MODEL_DIR = "alice/pico"' in result.stdout
    assert hub.repos["alice/pico"].private
    pushed = hub.files("alice/pico")
    assert set(pushed) - set(SETTLED) == set(contents(tmp_path / "out"))
    again = json.loads(run(*command, "--push", "alice/pico", "--resume", "--json").stdout)
    assert again["pushed"]["commit"] == hub.repos["alice/pico"].refs["main"]
    assert len(hub.repos["alice/pico"].commits) == 2


def test_what_cannot_be_pushed_is_refused_before_the_work(
    pico: Path, hub: WritableHub, run: Run, tmp_path: Path
) -> None:
    hub.add("alice/taken", pico, token=TOKEN)
    refusals = {
        ("alice/pi co", "--token", TOKEN): (2, "is not a valid repository id"),
        ("alice/pico",): (1, "no Hub token"),
        ("alice/pico", "--token", READER): (1, "may only read"),
        ("carol/pico", "--token", TOKEN): (1, "cannot write for carol"),
        ("alice/taken", "--token", TOKEN): (1, "holds another model"),
        ("alice/taken", "--token", TOKEN, "--private"): (1, "exists already and is public"),
    }
    for words, (code, said) in refusals.items():
        for more in ([], ["--dry-run"]):
            result = run("quantize", pico, "--rank", 4, "--output", tmp_path / "out", "--push", *words, *more)
            assert said in error_of(result, code)
    assert "name one with --push" in error_of(run("quantize", pico, "--private"), 2)
    assert not (tmp_path / "out").exists()
    assert written(hub) == []


def test_a_push_that_fails_leaves_the_folder(pico: Path, hub: WritableHub, run: Run, tmp_path: Path) -> None:
    hub.upload.breaks_after = 0
    output = tmp_path / "out"
    options = ("--rank", 4, "--iter", 1, "--quiet", "--token", TOKEN, "--output", output)
    error = error_of(run("quantize", pico, *options, "--push", "alice/pico"))
    assert error.startswith(f"Error: {output} is complete, but not pushed: the Hub cannot serve")
    assert error.endswith(f"(push it with `loftq push {output} alice/pico`)")
    hub.upload.breaks_after = None
    assert run("push", output, "alice/pico", "--token", TOKEN).exit_code == 0


def test_a_training_pushes_its_adapter_and_the_id_trains(
    hub: WritableHub, made: Path, tmp_path: Path, run: Run
) -> None:
    """`train --push-to-hub`; then the repository's id is a model to train and to evaluate."""
    rows = [json.dumps({"prompt": f"{i}+{i}", "response": str(2 * i)}) for i in range(8)]
    (tmp_path / "sums.jsonl").write_text("\n".join(rows), encoding="utf-8")
    options = ["--data", tmp_path / "sums.jsonl", "--max-steps", 1, "--quiet"]
    none = run("train", made, *options, "--output", tmp_path / "sums", "--push-to-hub", "alice/pico")
    assert none.exit_code == 1
    assert "no Hub token" in none.stderr
    assert not (tmp_path / "sums").exists()
    os.environ["HF_TOKEN"] = TOKEN
    try:
        done = run("train", made, *options, "--output", tmp_path / "sums", "--push-to-hub", "alice/pico")
        assert done.exit_code == 0, done.stderr
        assert {"sums/adapter_model.safetensors", "loftq_init/adapter_model.safetensors"} <= set(
            hub.files("alice/pico")
        )
        again = run("train", "alice/pico", *options, "--output", tmp_path / "again")
        assert again.exit_code == 0, again.stderr
    finally:
        del os.environ["HF_TOKEN"]
    assert TOKEN not in done.stdout + done.stderr + again.stderr


def test_a_damaged_folder_is_not_pushed_and_a_pushed_one_is_sound(
    hub: WritableHub, made: Path, tmp_path: Path, run: Run
) -> None:
    """`verify` on what comes back; and a byte of a shard that is another."""
    assert run("push", made, "alice/pico", "--token", TOKEN).exit_code == 0
    for name, content in hub.files("alice/pico").items():
        path = tmp_path / "back" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert run("verify", tmp_path / "back").exit_code == 0
    shard = sorted((tmp_path / "back").glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    refused = run("push", tmp_path / "back", "alice/other", "--token", TOKEN)
    assert refused.exit_code == 1
    assert shard.name in refused.stderr
    assert "alice/other" not in hub.repos


def test_an_adapter_for_another_backbone(hub: WritableHub, pico: Path, made: Path, tmp_path: Path) -> None:
    backbone = Path(shutil.copytree(made, tmp_path / "quantized"))
    for name in ("loftq.json", "README.md"):
        (backbone / name).unlink()
    shutil.rmtree(backbone / "loftq_init")
    hub.add("someone/quantized", backbone)
    start = loftq.quantize(str(pico), backbone="someone/quantized@main", rank=4, output=tmp_path / "start").folder
    loftq.push(start, "alice/start", token=TOKEN)
    served = hub.repos["alice/start"].commits[hub.repos["alice/start"].refs["main"]]
    config = json.loads((served / ADAPTER).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/quantized", "main")
    card = ModelCard.load(served / "README.md")
    assert (card.data.base_model, card.data.library_name) == ("someone/quantized", "peft")
    assert 'ADAPTER = "alice/start"' in card.text
    assert str(tmp_path) not in card.content + (served / "loftq.json").read_text()
