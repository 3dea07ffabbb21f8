"""Symbolic links at every path that a verb opens. Oracle: the files outside of the folder, which stay as they are.

Also that what they hold comes into no output.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Result
from folders import hashes
from safetensors.torch import load_file, save_file

import loftq

FAST = ("--rank", "4", "--iter", "1", "--quiet", "--workers", "1")
SECRET = "hf_SecretOfTheEnvironment"
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def made(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact. Do not write to it."""
    output = tmp_path_factory.mktemp("made") / "made"
    return loftq.quantize(str(pico), rank=4, iters=1, output=output, quiet=True).folder


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "artifact"))


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of somebody's files."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text(SECRET)
    return tmp_path / "outside"


def plant(folder: Path, name: str, outside: Path) -> Path:
    """Move a file or folder out of a folder, or take the one with a secret, and put a link in its place."""
    path, target = folder / name, outside / Path(name).name
    if path.exists():
        shutil.move(path, target)
    else:
        target = outside / "precious"
        path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


def refused(result: Result, link: Path) -> None:
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    assert f"{link} is a symbolic link to " in result.stderr.rstrip("\n").rpartition("\n")[2]


# Sources


SOURCE_FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md", "LICENSE"]


@pytest.mark.parametrize("name", [*SOURCE_FILES, "generation_config.json", "additional_chat_templates/x.jinja"])
def test_a_model_whose_file_lies_elsewhere_is_refused(
    name: str, pico: Path, outside: Path, run: Run, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(pico, tmp_path / "model"))
    link = plant(model, name, outside)
    before = hashes(outside)
    refused(run("quantize", model, *FAST, "--output", tmp_path / "out"), link)
    refused(run("quantize", model, *FAST, "--output", tmp_path / "out", "--dry-run"), link)
    assert not (tmp_path / "out").exists()
    assert hashes(outside) == before


def test_a_shard_that_lies_elsewhere_is_refused(pico_sharded: Path, outside: Path, run: Run, tmp_path: Path) -> None:
    model = Path(shutil.copytree(pico_sharded, tmp_path / "model"))
    (model / "sub").mkdir()
    index = json.loads((model / "model.safetensors.index.json").read_text())
    shard = min(index["weight_map"].values())
    index["weight_map"] = {k: f"sub/{v}" if v == shard else v for k, v in index["weight_map"].items()}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.move(model / shard, outside / shard)
    (model / "sub").rmdir()
    (model / "sub").symlink_to(outside)
    refused(run("quantize", model, *FAST, "--output", tmp_path / "out"), model / "sub" / shard)


def test_only_files_of_a_model_are_copied(
    pico: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links that nothing reads stay behind, as hidden files and the state of a training do; inner links are files."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    model = Path(shutil.copytree(pico, tmp_path / "model"))
    (model / "x.txt").symlink_to("/proc/self/environ")
    (model / "notes.json").symlink_to(tmp_path / "missing")
    for name in (".env", "trainer_state.json", "training_args.bin", "optimizer.pt", "modules.json", "x.jinja.bak"):
        (model / name).write_text(SECRET)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool.jinja").write_text("{{ 1 }}")
    (model / "LICENSE").write_text("Apache 2.0")
    (model / "COPYING").symlink_to("LICENSE")
    assert run("quantize", model, *FAST, "--output", tmp_path / "out").exit_code == 0
    copied = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"}
    copied |= {"COPYING", "additional_chat_templates/tool.jinja"}
    made = {"config.json", "model.safetensors", "README.md", "loftq.json"}
    files = hashes(tmp_path / "out")
    assert {name for name in files if not name.startswith("loftq_init/")} == copied | made
    assert all(files[name] == hashes(model)[name] for name in copied)
    assert not any((tmp_path / "out" / name).is_symlink() for name in files)
    assert (
        run(
            "merge", tmp_path / "out", "--to", "bf16", "--output", tmp_path / "merged", "--quiet", "--no-check"
        ).exit_code
        == 0
    )
    assert set(hashes(tmp_path / "merged")) == copied | made
    for path in tmp_path.glob("[om]*/**/*"):
        assert path.is_dir() or path.is_relative_to(model) or SECRET.encode() not in path.read_bytes()


# Artifacts


READERS: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "merge": lambda folder, out: ("merge", folder, "--to", "bf16", "--output", out / "o", "--quiet"),
    "push": lambda folder, _: ("push", folder, "alice/pico", "--token", "hf_x"),
    "train": lambda folder, out: ("train", folder, "--data", out / "data.jsonl", "--output", out / "o"),
    "evaluate": lambda folder, out: ("evaluate", folder, "--data", out / "data.jsonl", "--card"),
    "generate": lambda folder, _: ("generate", folder, "--prompt", "a"),
    "report": lambda folder, out: ("report", folder, "--html", out / "o"),
    "resume": lambda folder, _: ("quantize", PICO[0], *FAST, "--output", folder, "--resume"),
    "overwrite": lambda folder, _: ("quantize", PICO[0], *FAST, "--output", folder, "--overwrite"),
    "merge over": lambda folder, _: ("merge", MADE[0], "--to", "bf16", "--output", folder, "--overwrite"),
}
PICO: list[Path] = []
MADE: list[Path] = []
ARTIFACT_FILES = [
    "loftq.json",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "README.md",
    "loftq_init",
    "loftq_init/adapter_config.json",
    "loftq_init/adapter_model.safetensors",
    "added_tokens.json",
]


@pytest.mark.parametrize("reader", READERS)
def test_an_artifact_with_a_link_is_refused(
    reader: str, pico: Path, made: Path, artifact: Path, outside: Path, run: Run, tmp_path: Path
) -> None:
    PICO[:], MADE[:] = [pico], [made]
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n' * 8)
    for name in ARTIFACT_FILES:
        link = plant(artifact, name, outside)
        before, inside = hashes(outside), set(artifact.iterdir())
        refused(run(*READERS[reader](artifact, tmp_path)), link)
        assert hashes(outside) == before
        assert set(artifact.iterdir()) == inside
        assert not (tmp_path / "o").exists()
        target = link.readlink()
        link.unlink()
        if target.name != "precious":
            shutil.move(target, link)


def test_inspect_reads_no_linked_file(artifact: Path, outside: Path, run: Run) -> None:
    for name in ("loftq.json", "model.safetensors", "loftq_init/adapter_config.json"):
        link = plant(artifact, name, outside)
        refused(run("inspect", artifact), link)
        shutil.move(link.readlink(), link)


@pytest.mark.parametrize("name", [name for name in ARTIFACT_FILES if name != "loftq.json"] + ["x", "sub"])
def test_verify_reports_every_link(name: str, artifact: Path, outside: Path, run: Run) -> None:
    plant(artifact, name, outside)
    result = run("verify", artifact, "--json", "--quiet")
    assert (result.exit_code, json.loads(result.stdout)["sound"]) == (1, False)
    problem = {"where": name, "what": "is a symbolic link, which is not followed: a copy must take its place"}
    assert json.loads(result.stdout)["problems"] == [problem]


def test_verify_names_what_can_run_code(artifact: Path) -> None:
    (artifact / "setup.py").write_text("1")
    (artifact / "loftq_init" / "adapter_model.bin").write_bytes(b"\x80\x02}.")
    (artifact / "LICENSE").write_text("#!/bin/sh")
    (artifact / "tokenizer.json").chmod(0o755)
    notes = loftq.verify(artifact, quiet=True).notes
    assert [note for note in notes if "LICENSE, loftq_init/adapter_model.bin, setup.py and 1 more" in note]


# Outputs


@pytest.mark.parametrize("option", ["--overwrite", "--resume"])
@pytest.mark.parametrize(
    "name", [".loftq-partial", ".loftq-partial/journal.jsonl", ".loftq-partial/model.safetensors", ".loftq-partial/sub"]
)
def test_a_partial_folder_with_links_is_not_ours(
    name: str, option: str, pico: Path, outside: Path, run: Run, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    (output / name).parent.mkdir(parents=True)
    (outside / "journal.jsonl").write_text('{"fingerprint": {}}\n')
    to_file = name.endswith(("jsonl", "safetensors"))
    (output / name).symlink_to(outside / "journal.jsonl" if to_file else outside)
    before = hashes(outside)
    refused(run("quantize", pico, *FAST, "--output", output, option), output / name)
    assert hashes(outside) == before


def test_overwriting_removes_nothing_outside(artifact: Path, pico: Path, outside: Path, run: Run) -> None:
    """A listed file in a linked folder, which need not be there when the folder was made."""
    (artifact / "sub").symlink_to(outside)
    manifest = json.loads((artifact / "loftq.json").read_text())
    manifest["files"]["sub/precious"] = {"bytes": 1}
    (artifact / "loftq.json").write_text(json.dumps(manifest))
    refused(run("quantize", pico, *FAST, "--output", artifact, "--overwrite"), artifact / "sub")
    assert (outside / "precious").read_text() == SECRET


def test_an_output_may_be_a_link_to_a_folder(pico: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "named").symlink_to(tmp_path / "disk")
    assert run("quantize", pico, *FAST, "--output", tmp_path / "named").exit_code == 0
    assert (tmp_path / "disk" / "loftq.json").is_file()
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    result = run("quantize", pico, *FAST, "--output", tmp_path / "nowhere")
    assert "nowhere is a symbolic link to a folder that does not exist" in result.stderr


# Training and pushing


TRAINED = ["training.json", "adapter_model.safetensors", "tokenizer.json", "checkpoint-3", "checkpoint-3/optimizer.pt"]


@pytest.mark.parametrize("option", ["--overwrite", "--resume"])
def test_training_writes_and_removes_nothing_outside(
    option: str, made: Path, outside: Path, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n' * 8)
    for name in TRAINED:
        output = tmp_path / name.replace("/", "-")
        output.mkdir()
        if name != "training.json":
            (output / "training.json").write_text('{"settings": {}}')
        (outside / "sub").mkdir(exist_ok=True)
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).symlink_to(outside / "sub" if name == "checkpoint-3" else outside / "precious")
        before = hashes(outside)
        refused(run("train", made, "--data", tmp_path / "data.jsonl", "--output", output, option), output / name)
        assert hashes(outside) == before


def test_push_refuses_links_in_the_folder_of_an_adapter(made: Path, outside: Path, run: Run, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(made / "loftq_init", tmp_path / "trained"))
    save_file({k: v + 1 for k, v in load_file(adapter / "adapter_model.safetensors").items()}, adapter / "other")

    def push(folder: Path) -> Any:
        return run("push", made, "alice/pico", "--token", "hf_x", "--adapter", folder)

    for name in ("adapter_config.json", "adapter_model.safetensors", "training.json"):
        link = plant(adapter, name, outside)
        refused(push(adapter), link)
        target = link.readlink()
        link.unlink()
        if target.name != "precious":
            shutil.move(target, link)
    (tmp_path / "latest").symlink_to(adapter)
    refused(push(tmp_path / "latest"), tmp_path / "latest")
