"""The card: what the Hub reads of it, by the Hub's own client, and that its command makes the same artifact again.

Covers: loftq/artifacts/card_metadata.py, loftq/artifacts/loading_snippet.py, loftq/planning/command_line.py.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Result
from hub import Hub, client_of, serve
from huggingface_hub import ModelCard

import loftq
from loftq.hub.source import find_source
from loftq.planning.command_line import command_line
from loftq.planning.recipe import recipe_of
from loftq.settings import said

Run = Callable[..., Result]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """An empty Hub, with the client and an empty cache before it."""
    with serve(Hub()) as served, client_of(served.endpoint, tmp_path / "hf"):
        yield served


def card_of(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text())


def make(source: object, output: Path, **options: Any) -> Path:
    return loftq.quantize(str(source), output=output, rank=4, iters=1, quiet=True, **options).folder


def licensed(pico: Path, folder: Path, head: str) -> Path:
    shutil.copytree(pico, folder)
    (folder / "README.md").write_text(head)
    (folder / "LICENSE").write_text("You may.")
    return folder


def test_the_hub_reads_what_it_was_made_from(pico: Path, hub: Hub, tmp_path: Path) -> None:
    head = "---\nlicense: other\nlicense_name: pico\nlicense_link: LICENSE\ntags: [llama]\n---\n# Pico\n"
    commit = hub.add("user/model", licensed(pico, tmp_path / "repository", head))
    folder = make("user/model", tmp_path / "out")
    assert card_of(folder).data.to_dict() == {
        "base_model": "user/model",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "other",
        "license_name": "pico",
        "license_link": "LICENSE",
        "tags": ["loftq", "qlora", "bitsandbytes", "4-bit"],
    }
    assert (folder / "LICENSE").read_text() == "You may."
    assert f"--revision {commit}\n" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: [mit, cc0-1.0]\n---\n", ["mit", "cc0-1.0"]),
        ("---\nlicense: 4\n---\n", None),
        ("---\n- no\n- mapping\n---\n", None),
        ("---\nlicense: {\n---\n", None),
        ("no head", None),
        ("", None),
    ],
)
def test_a_folders_licence_is_its_cards(head: str, expected: object, pico: Path, tmp_path: Path) -> None:
    from loftq.artifacts.card_metadata import metadata
    from loftq.planning.planner import make_plan

    source = find_source(str(licensed(pico, tmp_path / "licensed", head)))
    data = ModelCard(f"---\n{metadata(make_plan(source, recipe_of(rank=4)))}\n---\n").data
    assert data.license == expected
    assert data.base_model is None


def test_a_calibrated_start_names_its_data_set(pico: Path) -> None:
    from loftq.artifacts.card_metadata import metadata
    from loftq.planning.planner import make_plan

    source = find_source(str(pico))
    datasets = {"Salesforce/wikitext:wikitext-2-v1": ["Salesforce/wikitext"], "default": None, "/home/me/a.txt": None}
    for text, expected in datasets.items():
        plan = make_plan(source, recipe_of(rank=4, calibration=text))
        assert ModelCard(f"---\n{metadata(plan)}\n---\n").data.datasets == expected
        assert "/home/me" not in command_line(plan.recipe, source)


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--bits 4 --rank 16 --iter 5",
        "--bits 2 --alpha 8.5 --rslora --dropout 0.1",
        "--bits 8",
        "--bits 8 --group-size 32",
        "--bits 3 --quant-type int --group-size 32 --zero-point float --compute-dtype float16",
        "--bits 2.5",
        "--bits 2.5 --allocation first --seed 7",
        "--adapter qalora --rank 1 --pool-size 64 --group-size 32",
        "--double-quant --target-modules q_proj,v_proj --exclude-modules 'layers.0.*' --max-shard-size 1GB",
        "--calibration default --refine 0 --scales absmax --method qera",
        "--method qlora --rank 4 --format loftq --task sequence-classification --num-labels 3",
    ],
)
def test_its_command_has_the_same_settings(options: str, pico: Path, run: Run) -> None:
    """Oracle: the command line itself, on what it is given and on what the card says."""
    words = [*shlex.split(options), "--dry-run", "--json"]
    recipe = json.loads(run("quantize", pico, *words).stdout)["recipe"]
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in recipe.items()
        if name != "alpha" or "--alpha" in options
    }
    command = command_line(recipe_of(**given), find_source(str(pico)))
    program, verb, _, *said = shlex.split(command.replace("\\\n", " "))
    assert (program, verb) == ("loftq", "quantize")
    again = json.loads(run("quantize", pico, *said, "--dry-run", "--json").stdout)["recipe"]
    assert again == recipe
    assert max(map(len, command.splitlines())) <= 120


def test_its_command_says_no_more_than_it_must() -> None:
    assert said(recipe_of().requested) == {}
    assert said(recipe_of(bits=8).requested) == {"bits": 8}
    assert said(recipe_of(bits=2.5).requested) == {"bits": 2.5}
    assert said(recipe_of(quant_type="int", group_size=32).requested) == {"quant_type": "int", "group_size": 32}
    assert said(recipe_of(calibration="default", iters=7).requested) == {"calibration": "default", "iters": 7}


def test_its_command_makes_the_same_bytes(pico: Path, hub: Hub, run: Run, tmp_path: Path) -> None:
    """Oracle: the bytes of both folders."""
    hub.add("user/model", pico)
    folder = make("user/model", tmp_path / "out", double_quant=True, seed=3)
    block = (folder / "README.md").read_text().split("```\nloftq quantize")[1].split("```")[0]
    words = shlex.split(block.replace("\\\n", " "))
    assert run("quantize", *words, "--output", tmp_path / "again", "--quiet").exit_code == 0
    for name in ("model.safetensors", "loftq_init/adapter_model.safetensors", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_it_warns_that_an_adapter_belongs_to_its_backbone(pico: Path, tmp_path: Path) -> None:
    folder = make(pico, tmp_path / "out")
    text = (folder / "README.md").read_text()
    bits = json.loads((folder / "loftq.json").read_text())["totals"]["bits_per_weight"]
    assert "The adapter belongs to this backbone, and so does every adapter that is trained from it." in text
    assert f"| bits per weight of the linears | {bits:.3f} |" in text
    assert "loftq quantize pico-llama --bits 4 --rank 4 --iter 1\n" in text


@pytest.mark.parametrize(("method", "warned"), [("loftq", True), ("qlora", False)])
def test_only_a_backbone_that_needs_its_adapter_warns_of_loading_it_alone(
    method: str, warned: bool, pico: Path, tmp_path: Path
) -> None:
    """QLoRA's start adds nothing to its backbone."""
    folder = loftq.quantize(str(pico), output=tmp_path / "out", rank=4, method=method, quiet=True).folder
    assert ("**Always load the adapter too.**" in (folder / "README.md").read_text()) is warned
