"""Lockstep runs against the same model called plainly, batch after batch."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from picos import pico_config
from torch import nn

from loftq.models.lockstep import find_blocks, run
from loftq.models.tasks import TASKS, auto_class


class Block(nn.Module):
    """A linear that counts how many of its kind run at once."""

    running = 0

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: torch.Tensor, *, scale: float) -> tuple[torch.Tensor, float]:
        assert Block.running == 0
        Block.running += 1
        found = torch.tanh(self.linear(x)) * scale
        Block.running -= 1
        return found, scale


class Model(nn.Module):
    """Two lists of blocks, one of which a batch with `twice` goes through twice and with `skip` not at all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.ModuleList(Block(8) for _ in range(3))
        self.second = nn.ModuleList(Block(8) for _ in range(2))

    def forward(self, x: torch.Tensor, times: int = 1, fail: bool = False) -> dict[str, torch.Tensor]:
        for i, block in enumerate(self.first):
            x, _ = block(x, scale=1.0 + i)
        for _ in range(times):
            for block in self.second:
                x, scale = block(x, scale=0.5)
                assert scale == 0.5
        if fail:
            raise ValueError("no such batch")
        assert not torch.is_grad_enabled()
        return {"x": x}


class Log:
    """Notes what a run calls."""

    def __init__(self, fail_at: str = "") -> None:
        self.events: list[str] = []
        self.outputs: dict[int, Any] = {}
        self.kept: dict[int, Any] = {}
        self.rounds = 0
        self.fail_at = fail_at

    def enter(self, block: str) -> None:
        self.events.append(f"enter {block}")
        if block == self.fail_at:
            raise OSError("cannot read")

    def keep(self, index: int, output: Any) -> None:
        self.kept[index] = output

    def leave(self, block: str, rounds: int) -> None:
        self.events.append(f"leave {block}")
        self.rounds = rounds

    def passed(self, block: str | None, rounds: int) -> None:  # noqa: ARG002
        if block is not None:
            self.events.append(block)

    def finish(self, index: int, output: Any) -> None:
        self.outputs[index] = output


NAMES = ["first.0", "first.1", "first.2", "second.0", "second.1"]


def inputs(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"x": torch.full((2, 8), 0.1 * i + 0.1), **more} for i in range(count)]


def blocks_of(model: Model) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in NAMES}


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loftq-lockstep"]


def check(model: nn.Module, batches: list[dict[str, Any]], blocks: dict[str, nn.Module]) -> list[str]:
    log = Log()
    run(model, batches, blocks, log)
    assert not threads()
    assert sorted(log.outputs) == list(range(len(batches)))
    with torch.no_grad():
        for i, batch in enumerate(batches):
            assert torch.equal(log.outputs[i]["x"], model(**batch)["x"])
    return log.events


def test_outputs_are_those_of_plain_calls_and_each_block_is_entered_once() -> None:
    model = Model()
    events = check(model, inputs(3), blocks_of(model))
    assert events == [event for name in NAMES for event in (f"enter {name}", *[name] * 3, f"leave {name}")]
    assert "forward" not in model.first[0].__dict__


def test_batches_may_take_different_ways() -> None:
    model = Model()
    batches = [*inputs(1, times=0), *inputs(1, times=3), *inputs(1, times=1)]
    events = check(model, batches, blocks_of(model))
    second = ["enter second.0", "second.0", "second.0", "leave second.0"]
    assert events[15:19] == second
    assert events.count("second.0") == 4
    assert events.count("enter second.0") == 3
    assert events[-1] == "leave second.1"


def test_a_block_that_is_called_again_at_once_stays() -> None:
    model = Model()
    events = check(model, inputs(2, times=2), {"second.0": model.second[0]})
    assert events == ["enter second.0", *["second.0"] * 4, "leave second.0"]


def test_without_blocks_batches_run_one_after_another() -> None:
    assert check(Model(), inputs(3), {}) == []


@pytest.mark.parametrize(("fail_at", "fails"), [("", 1), ("", 0), ("second.0", None), ("first.0", None)])
def test_an_error_is_raised_here_and_ends_all_threads(fail_at: str, fails: int | None) -> None:
    model = Model()
    batches = [{**batch, "fail": i == fails} for i, batch in enumerate(inputs(3))]
    with pytest.raises(ValueError if fails is not None else OSError, match=r"no such batch|cannot read"):
        run(model, batches, blocks_of(model), Log(fail_at))
    assert not threads()
    assert all("forward" not in block.__dict__ for block in blocks_of(model).values())


def test_an_interrupt_ends_all_threads() -> None:
    model = Model()

    class Interrupted(Log):
        def passed(self, block: str | None, rounds: int) -> None:  # noqa: ARG002
            if block == "first.1":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, inputs(3), blocks_of(model), Interrupted())
    assert not threads()


@pytest.mark.parametrize(
    ("family", "task", "module", "expected"),
    [
        ("llama", "causal-lm", "model.layers.1.mlp.up_proj", ["model.layers.0", "model.layers.1"]),
        ("gpt2", "causal-lm", "transformer.h.0.mlp.c_fc", ["transformer.h.0", "transformer.h.1"]),
        ("bart", "seq2seq-lm", "model.decoder.layers.0.fc1", ["model.decoder.layers.0", "model.decoder.layers.1"]),
        ("t5", "seq2seq-lm", "encoder.block.0.layer.0.SelfAttention.q", ["encoder.block.0", "encoder.block.1"]),
        (
            "albert",
            "masked-lm",
            "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn",
            ["albert.encoder.albert_layer_groups.0"],
        ),
        ("llama", "causal-lm", "lm_head", []),
    ],
)
def test_blocks_are_members_of_the_outermost_list(family: str, task: str, module: str, expected: list[str]) -> None:
    with torch.device("meta"):
        model = auto_class(TASKS[task]).from_config(pico_config(family))
    assert module in dict(model.named_modules())
    assert find_blocks(model, [module]) == expected


def test_lists_of_lists_are_no_blocks() -> None:
    model = nn.ModuleDict({"stages": nn.ModuleList(nn.ModuleList([Block(8)]) for _ in range(2)), "head": Block(8)})
    assert find_blocks(model, ["stages.1.0.linear"]) == ["stages.0.0", "stages.1.0"]
