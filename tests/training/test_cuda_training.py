"""Training, measuring and writing on a GPU, with the defaults that it has there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rows import sums, write_rows
from test_train import FAST, killed_after, losses

import loftq
from loftq.training.arguments import arguments_of
from loftq.training.estimate import estimate
from loftq.training.settings import TrainSettings

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "int8": {"bits": 8},
    "nf2": {"bits": 2},
    "gptq": {"bits": 4, "quant_type": "int", "group_size": 32},
    "qalora": {"adapter": "qalora", "group_size": 16},
}
DEFAULTS = {name: value for name, value in FAST.items() if name != "dtype"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_rows(tmp_path_factory.mktemp("data") / "sums.jsonl", sums()))


@pytest.fixture
def artifact(pico: Path, tmp_path: Path) -> Path:
    return loftq.quantize(str(pico), output=tmp_path / "artifact", rank=4, iters=2, quiet=True).folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extra", [{}, {"dtype": "float16"}, {"gradient_checkpointing": True}], ids=str)
def test_every_kind_learns(
    kind: str,
    extra: dict[str, Any],
    pico: Path,
    data: str,
    tmp_path: Path,
    cuda: torch.device,  # noqa: ARG001
) -> None:
    folder = loftq.quantize(str(pico), output=tmp_path / "artifact", rank=4, quiet=True, **KINDS[kind]).folder
    loftq.train(str(folder), data=data, output=tmp_path / "out", **{**DEFAULTS, **extra})
    found = losses(tmp_path / "out")
    assert found[-1] < 0.95 * found[0]


def test_defaults_are_the_gpus(cuda: torch.device, tmp_path: Path) -> None:
    arguments = arguments_of(TrainSettings(model="m", output=str(tmp_path), data=("d",)), "qlora")
    assert (arguments.optim, arguments.bf16, arguments.use_cpu) == ("paged_adamw_8bit", True, False)
    assert arguments.device.type == cuda.type


def test_a_checkpoint_is_gone_on_with(
    artifact: Path,
    data: str,
    tmp_path: Path,
    cuda: torch.device,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: the run in one piece; with the state of the paged 8-bit optimizer."""
    asked = {**DEFAULTS, "max_steps": 8, "save_steps": 2, "eval_steps": 4, "data": data}
    whole = loftq.train(str(artifact), output=tmp_path / "whole", **asked)
    with killed_after(5, monkeypatch), pytest.raises(KeyboardInterrupt):
        loftq.train(str(artifact), output=tmp_path / "cut", **asked)
    resumed = loftq.train(str(artifact), output=tmp_path / "cut", resume=True, **asked)
    assert resumed.train_loss == pytest.approx(whole.train_loss, rel=1e-3)


def test_measuring_and_writing(artifact: Path, data: str, tmp_path: Path, cuda: torch.device) -> None:  # noqa: ARG001
    """Oracle: the CPU's perplexity."""
    found = loftq.evaluate(str(artifact), data=data, columns={"text": "prompt"}, quiet=True, cutoff_len=64)
    expected = loftq.evaluate(str(artifact), data=data, columns={"text": "prompt"}, quiet=True, cutoff_len=64, cpu=True)
    ours, theirs = (next(iter(each.rows.values()))["perplexity"] for each in (found, expected))
    assert ours == pytest.approx(theirs, rel=0.02)
    assert isinstance("".join(loftq.generate(str(artifact), prompt="1 + 1", max_new_tokens=4)), str)


def test_a_dry_run_is_near_what_it_takes(artifact: Path, data: str, tmp_path: Path, cuda: torch.device) -> None:
    planned = estimate(str(artifact), data=data, output="none", batch_size=4)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(cuda)
    loftq.train(str(artifact), data=data, output=tmp_path / "out", **DEFAULTS)
    assert json.loads((tmp_path / "out" / "training.json").read_text())
    assert torch.cuda.max_memory_allocated(cuda) < 4 * planned.memory + 1e8
