"""What the statistics of a calibration will take on the disk. Oracle: the tensors in a folder that was gathered."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import pico_llama, save_model
from grids import thinned
from picos import save_pico
from safetensors.torch import load_file

import loftq
from loftq.calibration import windows
from loftq.calibration.gather import gather
from loftq.calibration.sizes import statistics_bytes
from loftq.errors import OutputError
from loftq.formats import space
from loftq.hub.source import find_source
from loftq.planning.plan import Plan
from loftq.planning.planner import make_plan
from loftq.planning.recipe import recipe_of

TOKENS = 512


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "MIN_TOKENS", 256)


def planned(folder: Path, task: str = "causal-lm") -> Plan:
    return make_plan(find_source(str(folder)), recipe_of(rank=4, task=task, calibration="default"))


def gathered_bytes(plan: Plan, folder: Path) -> int:
    """The bytes of all tensors but the token ids and the choices of routers."""
    gather(plan, windows.prepare(plan, tokens=TOKENS, sequence_length=32), folder, quiet=True)
    found = [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file).items()]
    kept = [t for name, t in found if not name.endswith("_ids") and name not in ("experts", "weights")]
    return sum(tensor.nbytes for tensor in kept)


def test_inputs_of_different_sizes_are_counted_exactly(tmp_path: Path) -> None:
    plan = planned(save_model(pico_llama(head_dim=32), tmp_path / "pico"))
    assert statistics_bytes(plan, TOKENS) == gathered_bytes(plan, tmp_path / "statistics")


@pytest.mark.parametrize(
    ("name", "task"),
    thinned(
        [
            ("llama", "causal-lm"),
            ("gpt2", "causal-lm"),
            ("phi3", "causal-lm"),
            ("mixtral", "causal-lm"),
            ("bert", "masked-lm"),
            ("albert", "masked-lm"),
            ("deberta-v2", "feature-extraction"),
            ("bart", "seq2seq-lm"),
            ("t5", "seq2seq-lm"),
        ],
        lambda name, _: name in ("llama", "mixtral", "bert", "t5"),
    ),
)
def test_no_family_takes_less(name: str, task: str, tmp_path: Path) -> None:
    plan = planned(save_pico(name, task, tmp_path / "pico"), task)
    taken = gathered_bytes(plan, tmp_path / "statistics")
    assert 0.7 * taken <= statistics_bytes(plan, TOKENS) <= taken


def test_a_dry_run_says_it(pico: Path) -> None:
    report = loftq.quantize(str(pico), calibration="default", calibration_tokens=TOKENS, dry_run=True)
    assert report.statistics == report.to_dict()["statistics_bytes"] == statistics_bytes(planned(pico), TOKENS)
    assert "statistics       at least " in report.table()
    without = loftq.quantize(str(pico), dry_run=True)
    assert without.statistics is None
    assert "statistics" not in without.table()


def test_a_disk_that_is_too_small_is_refused_at_once(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model runs, and nothing is left."""
    plan = planned(pico)
    needed = statistics_bytes(plan, TOKENS)
    monkeypatch.setattr(space, "free_bytes", lambda _: needed - 1)
    with pytest.raises(OutputError, match=r"too full.*another --statistics"):
        gather(plan, windows.prepare(plan, tokens=TOKENS, sequence_length=32), tmp_path / "statistics", quiet=True)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(space, "free_bytes", lambda _: needed)
    gather(plan, windows.prepare(plan, tokens=TOKENS, sequence_length=32), tmp_path / "statistics", quiet=True)
