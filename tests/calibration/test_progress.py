"""Calibrations that are cut off and asked for again. Oracle: the bytes of an undisturbed one."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from picos import save_pico
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel

from loftq.calibration import gather as gathering
from loftq.calibration import progress, windows
from loftq.calibration.block_weights import BlockWeights
from loftq.calibration.gather import gather
from loftq.calibration.progress import PROGRESS, Progress
from loftq.calibration.windows import Calibration, prepare
from loftq.hub.source import find_source
from loftq.planning.plan import Plan
from loftq.planning.planner import make_plan
from loftq.planning.recipe import recipe_of

CASES = [
    ("llama", "causal-lm"),
    ("gpt2", "causal-lm"),
    ("falcon", "causal-lm"),
    ("gemma3", "image-text-to-text"),
    ("mixtral", "causal-lm"),
    ("bert", "masked-lm"),
    ("deberta-v2", "feature-extraction"),
    ("bart", "seq2seq-lm"),
    ("t5", "seq2seq-lm"),
]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "MIN_TOKENS", 256)
    monkeypatch.setattr(gathering, "BATCH_TOKENS", 192)
    monkeypatch.setattr(progress, "_EVERY", 0.0)


def plan_of(folder: Path, **options: Any) -> Plan:
    return make_plan(find_source(str(folder)), recipe_of(rank=4, **options))


def small(plan: Plan, **options: Any) -> Calibration:
    return prepare(plan, **{"tokens": 512, "sequence_length": 64, **options})


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def loads(monkeypatch: pytest.MonkeyPatch, stop: Callable[[], None] = lambda: None, at: int = 10**9) -> list[str]:
    """The blocks whose weights are read from now on; `stop` is called before one of them."""
    own, found = BlockWeights.load, []

    def load(self: BlockWeights, block: str) -> None:
        if len(found) == at:
            stop()
        found.append(block)
        own(self, block)

    monkeypatch.setattr(BlockWeights, "load", load)
    return found


def interrupt() -> None:
    raise KeyboardInterrupt


def cut_off(plan: Plan, calibration: Calibration, folder: Path, at: int) -> None:
    """Interrupt a run before a block."""
    with pytest.MonkeyPatch.context() as patch:
        loads(patch, interrupt, at)
        with pytest.raises(KeyboardInterrupt):
            gather(plan, calibration, folder, quiet=True)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_a_run_goes_on_to_the_same_bytes(
    family: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at every block."""
    plan = plan_of(save_pico(family, task, tmp_path / "model"))
    calibration = small(plan)
    every = loads(monkeypatch)
    expected = files_of(gather(plan, calibration, tmp_path / "whole", quiet=True).folder)
    blocks = list(every)
    for at in range(1, len(blocks)):
        folder = tmp_path / f"at-{at}"
        cut_off(plan, calibration, folder, at)
        assert (tmp_path / f".{folder.name}-partial" / PROGRESS).is_file()
        every.clear()
        assert files_of(gather(plan, calibration, folder, quiet=True).folder) == expected
        if at <= 2:  # behind it a decoder's blocks need what an encoder's last gave
            assert every == blocks[at:]
        assert not (tmp_path / f".{folder.name}-partial").exists()


def test_it_may_be_cut_off_at_every_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(save_pico("llama", "causal-lm", tmp_path / "model", num_hidden_layers=5))
    calibration = small(plan)
    expected = files_of(gather(plan, calibration, tmp_path / "whole", quiet=True).folder)
    for _ in range(4):
        cut_off(plan, calibration, tmp_path / "cut", 1)
    every = loads(monkeypatch)
    assert files_of(gather(plan, calibration, tmp_path / "cut", quiet=True).folder) == expected
    assert every == ["model.layers.4"]


def test_a_block_that_is_visited_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ALBERT's two groups by turns: what was summed up before is there, or all is done again."""
    folder = save_pico("albert", "masked-lm", tmp_path / "model", num_hidden_layers=4, num_hidden_groups=2)
    plan = plan_of(folder)
    calibration = small(plan)
    every = loads(monkeypatch)
    expected = files_of(gather(plan, calibration, tmp_path / "whole", quiet=True).folder)
    count = len(every)
    assert count > 1
    for at in range(1, count):
        cut_off(plan, calibration, tmp_path / f"at-{at}", at)
        assert files_of(gather(plan, calibration, tmp_path / f"at-{at}", quiet=True).folder) == expected


@pytest.mark.slow
def test_a_killed_run_goes_on(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(pico)
    expected = files_of(gather(plan, small(plan), tmp_path / "whole", quiet=True).folder)
    process = multiprocessing.get_context("spawn").Process(target=_be_killed, args=(pico, tmp_path / "known"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    every = loads(monkeypatch)
    assert files_of(gather(plan, small(plan), tmp_path / "known", quiet=True).folder) == expected
    assert every == ["model.layers.1"]


def _be_killed(model: Path, folder: Path) -> None:
    """In a process of its own, which has none of the fixtures."""
    windows.MIN_TOKENS, gathering.BATCH_TOKENS, progress._EVERY = 256, 192, 0.0
    plan = plan_of(model)
    with pytest.MonkeyPatch.context() as patch:
        loads(patch, lambda: os.kill(os.getpid(), signal.SIGKILL), 1)
        gather(plan, small(plan), folder, quiet=True)


@pytest.mark.parametrize("change", ["text", "layers", "weights", "moment", "state", "torn state", "record"])
def test_another_calibration_begins_anew(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was left is of another text, of weights that were written since, or damaged."""
    model = save_pico("llama", "causal-lm", tmp_path / "model")
    plan = plan_of(model)
    before = plan_of(model, exclude_modules=("up_proj",)) if change == "layers" else plan
    cut_off(before, small(before, seed=1 if change == "text" else 0), tmp_path / "known", 1)
    partial = tmp_path / ".known-partial"
    if change == "weights":
        os.utime(model / "model.safetensors", ns=(1, 1))
        plan = plan_of(model)
    elif change == "moment":
        next(partial.glob("moment-*")).unlink()
    elif change == "state":
        next(partial.glob("state-*")).unlink()
    elif change == "torn state":
        next(partial.glob("state-*")).write_bytes(b"PK")
    elif change == "record":
        (partial / PROGRESS).write_text("{")
    every = loads(monkeypatch)
    found = gather(plan, small(plan), tmp_path / "known", quiet=True)
    assert every == ["model.layers.0", "model.layers.1"]
    assert files_of(found.folder) == files_of(gather(plan, small(plan), tmp_path / "whole", quiet=True).folder)


def test_a_run_that_has_no_room_for_it_goes_on_without(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch says that a disk is full; after the first of a block's batches."""
    plan = plan_of(pico)
    expected = files_of(gather(plan, small(plan), tmp_path / "whole", quiet=True).folder)
    own, saved = torch.save, []

    def save(value: Any, path: Path) -> None:
        if saved:
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        saved.append(path)
        own(value, path)

    monkeypatch.setattr(torch, "save", save)
    assert files_of(gather(plan, small(plan), tmp_path / "known", quiet=True).folder) == expected
    assert len(saved) == 1


def _looking_back(self: Any, input_ids: torch.Tensor, **_: Any) -> BaseModelOutputWithPast:
    """Llama's forward, with the first block's output added to the last one's."""
    x = self.embed_tokens(input_ids)
    rotary = self.rotary_emb(x, torch.arange(x.shape[1]).unsqueeze(0))
    outputs = []
    for layer in self.layers:
        x = layer(x, position_embeddings=rotary)
        outputs.append(x)
    return BaseModelOutputWithPast(last_hidden_state=self.norm(x + outputs[0]))


def test_a_model_that_looks_back_is_run_from_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaModel, "forward", _looking_back)
    plan = plan_of(save_pico("llama", "causal-lm", tmp_path / "model", num_hidden_layers=3))
    expected = files_of(gather(plan, small(plan), tmp_path / "whole", quiet=True).folder)
    cut_off(plan, small(plan), tmp_path / "cut", 2)
    every = loads(monkeypatch)
    assert files_of(gather(plan, small(plan), tmp_path / "cut", quiet=True).folder) == expected
    assert every == ["model.layers.2", "model.layers.0", "model.layers.1", "model.layers.2"]


def test_outputs_come_back_as_they_were(tmp_path: Path) -> None:
    """Tuples, lists, dicts and what is no tensor; other kinds are not kept."""
    made = Progress(tmp_path, {"a": 1})
    made.begin()
    outputs = [(torch.arange(6.0).view(2, 3).bfloat16(), None, {"x": [torch.tensor([1, 2]), 0.5]}), torch.ones(2)]
    for i, output in enumerate(outputs):
        made.keep(i, output)
    made.end(3, 2, {}, {"t": "digest"}, 0)
    found = Progress(tmp_path, {"a": 1})
    assert (found.rounds, found.digests) == (3, {"t": "digest"})
    first = found.output(0)
    assert torch.equal(first[0], outputs[0][0])
    assert (first[1], first[2]["x"][1]) == (None, 0.5)
    lost = found.lost(0)
    assert lost[0].isnan().all()
    assert lost[0].shape == (2, 3)
    assert lost[2]["x"][0].tolist() == [0, 0]
    found.begin()
    found.keep(0, nn.Linear(1, 1))
    found.end(4, 1, {}, {}, 0)
    assert Progress(tmp_path, {"a": 1}).rounds == 3
    assert Progress(tmp_path, {"a": 2}).rounds == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["../precious", "/precious", "moment-00001.safetensors"])
def test_a_record_that_names_a_file_outside_is_not_continued(file: str, tmp_path: Path) -> None:
    """The run would remove it. Oracle: the same record with a file inside is continued."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    place = str(tmp_path / "precious") if file.startswith("/") else file
    first = Progress(folder, {"a": 1})
    (folder / place).write_text("precious")
    first.begin()
    first.keep(0, torch.ones(2))
    first.end(3, 1, {"q_proj": {"file": place, "count": 1}}, {}, 1)
    assert Progress(folder, {"a": 1}).rounds == (0 if "precious" in file else 3)
    assert "precious" not in file or (tmp_path / "precious").read_text() == "precious"
