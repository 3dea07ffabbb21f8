"""Inspect: what it says of a folder or a repository, and how little of either it reads.

Covers: cli/inspect.py, loftq/artifacts/contents.py.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Result
from hub import Hub, client_of, serve
from safetensors.torch import load_file

import loftq
from loftq.errors import ArtifactError, LoftQError, OptionError, SourceError

Run = Callable[..., Result]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve(Hub()) as served, client_of(served.endpoint, tmp_path / "hf"):
        yield served


@pytest.fixture(scope="module")
def folder(pico_sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact in several shards. Do not write to it."""
    output = tmp_path_factory.mktemp("inspect") / "folder"
    options: dict[str, Any] = {"rank": 4, "alpha": 8, "iters": 2, "max_shard_size": "60KB", "quiet": True}
    return loftq.quantize(str(pico_sharded), output=output, **options).folder


def tensors_of(folder: Path) -> dict[str, Any]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_sizes_are_those_of_the_files(folder: Path) -> None:
    """Oracle: the tensors in them."""
    found = loftq.inspect(folder)
    sizes = {name: tensor.nbytes for name, tensor in tensors_of(folder).items()}
    linears = sum(nbytes for name, nbytes in sizes.items() if ".mlp." in name or "_proj" in name)
    adapter = load_file(folder / "loftq_init" / "adapter_model.safetensors")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "loftq.json"]
    assert found.sizes == {
        "all files": sum(path.stat().st_size for path in files),
        "backbone": sum(sizes.values()),
        "adapter": sum(tensor.nbytes for tensor in adapter.values()),
        "linears": linears,
    }
    manifest = json.loads((folder / "loftq.json").read_text())
    assert found.weights == sum(row["shape"][0] * row["shape"][1] for row in manifest["layers"])
    assert found.bits_per_weight == pytest.approx(8 * linears / found.weights)
    assert found.bits_per_weight == pytest.approx(manifest["totals"]["bits_per_weight"])


def test_what_is_said_of_an_artifact(folder: Path) -> None:
    """Oracle: its configurations."""
    found = loftq.inspect(str(folder), worst=3)
    manifest = json.loads((folder / "loftq.json").read_text())
    config = json.loads((folder / "loftq_init" / "adapter_config.json").read_text())
    assert (found.kind, found.format, found.commit) == ("qlora", "bitsandbytes", None)
    assert found.adapter is not None
    for ours, theirs in {"rank": "r", "alpha": "lora_alpha", "target_modules": "target_modules"}.items():
        assert found.adapter[ours] == config[theirs]
    assert found.adapter["layers"] == 14
    assert [(kind["type"], kind["layers"]) for kind in found.types] == [("nf4, block size 64", 14)]
    assert found.settings == manifest["recipe"]
    errors = sorted((row["error"] for row in manifest["layers"]), reverse=True)
    assert [row["error"] for row in found.worst] == errors[:3]
    for text in ("14 x nf4, block size 64", "rank 4, alpha 8", "down_proj, gate_proj", "iters 2", "bits per weight"):
        assert text in found.table()


def test_a_repository_is_read_without_its_weights(folder: Path, hub: Hub) -> None:
    """Oracle: the folder that it is made of, and what the server was asked for."""
    commit = hub.add("user/model", folder)
    found = loftq.inspect("user/model")
    local = loftq.inspect(folder)
    assert found.commit == commit
    assert {**found.to_dict(), "name": "", "commit": None} == {**local.to_dict(), "name": ""}
    weights = [r for r in hub.requests if r.path.endswith(".safetensors")]
    assert len(weights) == 4  # three shards and an adapter
    assert all(re.fullmatch(r"bytes=\d+-\d+", request.headers["range"]) for request in weights)


def test_a_repository_of_somebody_with_a_token(folder: Path, hub: Hub, run: Run) -> None:
    hub.add("user/model", folder, private=True, token="hf_mine")
    with pytest.raises(SourceError, match="no model 'user/model' here or on the Hub"):
        loftq.inspect("user/model")
    assert loftq.inspect("user/model", token="hf_mine").kind == "qlora"
    result = run("inspect", "user/model", "--token", "hf_mine")
    assert result.exit_code == 0
    assert "hf_mine" not in result.stdout + result.stderr


def test_revisions(folder: Path, hub: Hub, pico: Path) -> None:
    hub.add("user/model", pico)
    commit = hub.repos["user/model"].commit(folder, "dev")
    assert loftq.inspect("user/model", revision="dev").commit == commit
    with pytest.raises(SourceError, match="has no revision 'none'"):
        loftq.inspect("user/model", revision="none")
    with pytest.raises(ArtifactError, match=r"user/model has neither a loftq\.json nor an adapter_config\.json: "):
        loftq.inspect("user/model")


def test_a_hub_out_of_reach(tmp_path: Path) -> None:
    with (
        client_of("http://127.0.0.1:9", tmp_path / "away"),
        pytest.raises(SourceError, match="cannot download 'user/m' "),
    ):
        loftq.inspect("user/m")


@pytest.mark.parametrize("remote", [False, True])
def test_a_trained_adapter(remote: bool, folder: Path, hub: Hub, tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    loftq.load_qlora(folder).save_pretrained(trained)
    hub.add("user/trained", trained)
    found = loftq.inspect("user/trained" if remote else trained)
    assert found.kind == "trained adapter"
    assert found.adapter is not None
    assert (found.adapter["rank"], found.adapter["kind"], found.adapter["layers"]) == (4, "plain LoRA", 14)
    assert found.source["model"] == str(folder)
    assert f"made for  {folder}" in found.table()


@pytest.mark.parametrize(
    ("options", "types"),
    [
        ({"bits": 8}, {"int8 with symmetric zero-points, one scale per row"}),
        ({"bits": 3, "allocation": "first"}, {"nf4, block size 64", "nf2, block size 64"}),
        ({"adapter": "qalora", "group_size": 16, "rank": 2}, {"int4 with float zero-points, group size 16"}),
    ],
)
def test_types(options: dict[str, Any], types: set[str], pico: Path, tmp_path: Path) -> None:
    found = loftq.inspect(loftq.quantize(str(pico), output=tmp_path / "out", quiet=True, **options).folder)
    assert {kind["type"] for kind in found.types} == types
    assert sum(kind["layers"] for kind in found.types) == 14
    totals = json.loads((tmp_path / "out" / "loftq.json").read_text())["totals"]
    assert found.bits_per_weight == pytest.approx(totals["bits_per_weight"])


@pytest.mark.parametrize("to", ["int", "bf16", "lora"])
def test_merged_folders(to: str, pico: Path, tmp_path: Path) -> None:
    folder = loftq.quantize(
        str(pico), adapter="qalora", group_size=16, rank=2, iters=1, output=tmp_path / "out", quiet=True
    ).folder
    loftq.merge(folder, to=to, output=tmp_path / "merged", check=False, quiet=True)
    found = loftq.inspect(tmp_path / "merged")
    assert found.kind == ("adapter" if to == "lora" else "merged")
    assert (found.bits_per_weight is not None) == (to == "int")
    assert (found.adapter is not None) == (to == "lora")
    assert found.table().startswith("name")


def test_no_weights_are_read(folder: Path, tmp_path: Path) -> None:
    """Oracle: a copy whose weights are no weights, of the same size."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for path in copy.rglob("*.safetensors"):
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        path.write_bytes(content[:header] + b"\xff" * (len(content) - header))
    assert {**loftq.inspect(copy).to_dict(), "name": ""} == {**loftq.inspect(folder).to_dict(), "name": ""}


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
            r"copy lacks model-00002-of-00003\.safetensors: `l",
        ),
        (lambda f: (f / "model-00002-of-00003.safetensors").write_bytes(b"x"), "is truncated or damaged"),
        (lambda f: (f / "loftq_init" / "adapter_model.safetensors").unlink(), "lacks loftq_init/adapter_model"),
        (lambda f: (f / "loftq_init" / "adapter_config.json").write_text("{"), "is not valid JSON"),
        (lambda f: (f / "loftq.json").write_text("{}"), "is damaged"),
        (lambda f: (f / "loftq.json").unlink(), r"has neither a loftq\.json nor an adapter_config\.json"),
    ],
)
def test_damaged_folders(harm: Callable[[Path], object], message: str, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    harm(copy)
    with pytest.raises(LoftQError, match=message):
        loftq.inspect(copy)


def test_what_is_no_folder(folder: Path, pico: Path, tmp_path: Path) -> None:
    for name, message in {
        tmp_path / "nothing": "no such folder: ",
        folder / "loftq.json": "is a file: ",
        pico: r"has neither a loftq\.json nor an adapter_config\.json: expected a folder",
    }.items():
        with pytest.raises(LoftQError, match=message):
            loftq.inspect(name)
    with pytest.raises(OptionError, match="--worst -1: expected 0 or more"):
        loftq.inspect(folder, worst=-1)


def test_the_command(folder: Path, run: Run) -> None:
    result = run("inspect", folder, "--worst", 2)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.count("worst layer") == 2
    result = run("inspect", folder, "--json")
    assert json.loads(result.stdout) == loftq.inspect(folder).to_dict()
    result = run("inspect", folder / "none")
    assert (result.exit_code, result.stdout) == (1, "")
