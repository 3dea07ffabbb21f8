"""Statistics that belong to something else, or are damaged: refused, by name, before anything is made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq
from loftq.calibration import windows
from loftq.calibration.gather import gather
from loftq.calibration.statistics import VERSION, Statistics
from loftq.calibration.windows import Calibration, prepare
from loftq.errors import ArtifactError, OptionError
from loftq.hub.source import find_source
from loftq.planning.plan import Plan
from loftq.planning.planner import make_plan
from loftq.planning.recipe import recipe_of


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "MIN_TOKENS", 256)


def plan_of(folder: Path, **options: Any) -> Plan:
    return make_plan(find_source(str(folder)), recipe_of(rank=4, **options))


def small(plan: Plan, **options: Any) -> Calibration:
    return prepare(plan, **{"tokens": 512, "sequence_length": 64, **options})


@pytest.fixture(scope="module")
def gathered(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    """Of the pico llama. Do not write to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "MIN_TOKENS", 256)
        plan = plan_of(pico)
        return gather(plan, small(plan), tmp_path_factory.mktemp("gathered") / "cache", quiet=True)


@pytest.fixture
def cached(gathered: Statistics, tmp_path: Path) -> Path:
    """A copy of the folder."""
    return Path(shutil.copytree(gathered.folder, tmp_path / "cache"))


# Of something else


def test_each_task_has_statistics_of_its_own(pico: Path, cached: Path, tmp_path: Path) -> None:
    """Oracle: a model of tokens answers with tokens, one without a vocabulary with its hidden states."""
    other = plan_of(pico, task="sequence-classification", num_labels=3)
    assert small(other).key != small(plan_of(pico)).key
    with pytest.raises(OptionError, match=f"{cached} was gathered with --task causal-lm, not sequence-classification"):
        gather(other, small(other), cached, quiet=True)
    for name, options in (("tokens", {}), ("labels", {"task": "sequence-classification", "num_labels": 3})):
        asked: dict[str, Any] = {"calibration_tokens": 512, "sequence_length": 64, "refine": 2, **options}
        report = loftq.quantize(
            str(pico), output=tmp_path / "o" / name, rank=4, calibration="default", quiet=True, **asked
        )
        assert "divergence" in report.totals
    assert len(list((tmp_path / "o").glob("pico-llama-calibration-*"))) == 2


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight"],
)
def test_a_weight_that_is_not_quantized_counts_too(name: str, pico: Path, cached: Path, tmp_path: Path) -> None:
    """Oracle: one number of one tensor."""
    model = Path(shutil.copytree(pico, tmp_path / pico.name))
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[7] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    for modules in (None, ("q_proj",)):
        plan = plan_of(model, target_modules=modules)
        with pytest.raises(ArtifactError, match=f"{cached} was gathered with a different {name}: remove the folder"):
            gather(plan, small(plan), cached, quiet=True)


@pytest.mark.parametrize(("change", "refused"), [({"rms_norm_eps": 1e-3}, True), ({"dtype": "float16"}, False)])
def test_what_the_config_computes_counts_too(
    change: dict[str, Any], refused: bool, pico: Path, cached: Path, tmp_path: Path
) -> None:
    """Oracle: all weights are the same."""
    model = Path(shutil.copytree(pico, tmp_path / pico.name))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **change, "transformers_version": "4.0.0"}))
    plan = plan_of(model)
    if not refused:
        assert gather(plan, small(plan), cached, quiet=True).folder == cached
        return
    with pytest.raises(
        ArtifactError, match=rf"{cached} was gathered with a config\.json that differs from that of .*{model}"
    ):
        gather(plan, small(plan), cached, quiet=True)


# Damaged


def without(key: str, part: str | None = None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        record = json.loads((folder / "calibration.json").read_text())
        del (record if part is None else record[part])[key]
        (folder / "calibration.json").write_text(json.dumps(record))

    return change


def with_module(row: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        record = json.loads((folder / "calibration.json").read_text())
        record["modules"][MODULE] = row
        (folder / "calibration.json").write_text(json.dumps(record))

    return change


def with_moment(**panels: torch.Tensor) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = json.loads((folder / "calibration.json").read_text())["modules"][MODULE]["file"]
        save_file({name.strip("_"): panel for name, panel in panels.items()}, folder / file)

    return change


def with_teacher(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        answers = {**load_file(folder / "teacher.safetensors"), **changes}
        kept = {name: tensor for name, tensor in answers.items() if tensor is not None}
        save_file(kept, folder / "teacher.safetensors")

    return change


MODULE = "model.layers.0.self_attn.q_proj"  # of 64 inputs
DAMAGES = {
    "version alone": lambda folder: (folder / "calibration.json").write_text(f'{{"version": {VERSION}}}'),
    "no notes": without("notes"),
    "no seed": without("seed", "settings"),
    "no digest": without("config_sha256", "source"),
    "no row": with_module(None),
    "no file": with_module({"file": None, "count": 512}),
    "a list": lambda folder: (folder / "calibration.json").write_text(f'{{"version": {VERSION}, "modules": []}}'),
    "another size": with_moment(_0=torch.eye(32)),
    "another number of panels": with_moment(_0=torch.eye(64), _1=torch.eye(64)),
    "another name": with_moment(panel=torch.eye(64)),
    "not finite": with_moment(_0=torch.full((64, 64), torch.nan)),
    "no tokens": with_teacher(input_ids=None),
    "no answers": with_teacher(values=None, indices=None),
    "fewer windows": with_teacher(input_ids=torch.zeros(7, 64, dtype=torch.int32)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_named_and_what_to_do(damage: str, pico: Path, cached: Path) -> None:
    """Oracle: the message; what it says to do works."""
    DAMAGES[damage](cached)
    plan = plan_of(pico)

    def read() -> None:
        known = gather(plan, small(plan), cached, quiet=True)
        assert known.moment(MODULE) is not None
        assert known.teacher()

    with pytest.raises(
        ArtifactError, match=rf"{cached}/.* is damaged \(.*\): remove the folder to gather the statistics again"
    ):
        read()
    shutil.rmtree(cached)
    read()


@pytest.mark.parametrize("name", ["calibration.json", "teacher.safetensors", "the moment"])
def test_links_are_not_followed(name: str, pico: Path, cached: Path, tmp_path: Path) -> None:
    record = json.loads((cached / "calibration.json").read_text())
    path = cached / (record["modules"][MODULE]["file"] if name == "the moment" else name)
    shutil.move(path, tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    plan = plan_of(pico)
    with pytest.raises(ArtifactError, match=f"{path} is a symbolic link to {tmp_path / 'outside'}"):
        gather(plan, small(plan), cached, quiet=True)


@pytest.mark.parametrize("file", ["../outside", "/outside", "..\\outside"])
def test_a_record_that_names_a_file_outside_is_refused(file: str, pico: Path, cached: Path) -> None:
    with_module({"file": file, "count": 512})(cached)
    plan = plan_of(pico)
    with pytest.raises(ArtifactError, match=r"expected a file name inside its folder or null.: remove the folder"):
        gather(plan, small(plan), cached, quiet=True)
