"""The order of copies and computation on a device with streams, of which a model here keeps track."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loftq.core.grid import Grid
from loftq.models import expert_groups, expert_moves
from loftq.models.expert_groups import PackedStack, groups_of
from loftq.models.expert_moves import bytes_at_hand, groups_at_hand
from loftq.models.packed_experts import pack_stacks

EXPERTS = 6


class Stream:
    """A stream that knows the work that is done for sure when its next work begins."""

    def __init__(self, *_: Any) -> None:
        self.done: set[str] = set()

    def wait_stream(self, other: Stream) -> None:
        self.done |= other.done


def experts(weights: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module with packed experts of random codes, and groups of so many weights."""
    monkeypatch.setattr(expert_groups, "WEIGHTS_ON_CPU", weights)
    module = torch.nn.Module()
    module.experts = torch.nn.Module()
    module.experts.register_parameter("down_proj", torch.nn.Parameter(torch.zeros(EXPERTS, 16, 64)))
    pack_stacks(module, {"experts.down_proj": (Grid("nf4"), (EXPERTS, 16, 64))})
    for tensor in module.experts.packed_tensors().values():
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))
    module.experts.offloaded = True
    return module.experts


@pytest.mark.parametrize("weights", [1, 2 * 16 * 64, 1 << 24], ids=["one expert", "two experts", "all"])
def test_no_group_is_computed_before_its_copy_or_overwritten_before_its_end(
    weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracles: which work is certain to be done before other work, and the tensors that are held."""
    module = experts(weights, monkeypatch)
    computing, copying = Stream(), Stream()
    last_use: dict[int, str] = {}

    @contextmanager
    def entered(stream: Stream) -> Any:
        assert stream is copying
        yield

    backend = SimpleNamespace(current_stream=lambda _: computing, Stream=lambda _: copying, stream=entered)
    monkeypatch.setattr(torch, "get_device_module", lambda _: backend)
    copy = expert_moves._copy

    def noted(held: Any, group: Any, buffer: Any, streams: Any) -> Any:
        copied = copy(held, group, buffer, streams)
        place = buffer["down_proj"][0].data_ptr()
        assert last_use.get(place) is None or last_use[place] in copying.done
        copying.done.add(f"copy {group.experts}")
        return copied

    monkeypatch.setattr(expert_moves, "_copy", noted)
    groups = groups_of(torch.tensor([[0, 1], [4, 2], [5, 1]]), module.packed_stacks)  # not the expert 3
    seen = []
    for group, stored in groups_at_hand(module, groups, torch.device("cpu")):
        assert f"copy {group.experts}" in computing.done
        ready = len(groups) > 1 and group is not groups[-1]
        assert (len(copying.done - computing.done) == 1) == ready  # the next copy runs beside the computation
        for part, source in zip(stored["down_proj"], module.stored("down_proj"), strict=True):
            assert part is None if source is None else torch.equal(part, source[group.experts])
        computing.done.add(f"compute {group.experts}")
        last_use[stored["down_proj"][0].data_ptr()] = f"compute {group.experts}"  # type: ignore[union-attr]
        seen += group.experts
    assert seen == [0, 1, 2, 4, 5]
    assert len(last_use) <= expert_moves.BUFFERS


def test_bytes_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: two experts of 16 x 64 weights in bfloat16; twice their codes of 4 bits and scales of 2 bytes for 64."""
    module = experts(2 * 16 * 64, monkeypatch)
    module.packed_stacks = {"down_proj": PackedStack(Grid("nf4"), (EXPERTS, 16, 64), torch.bfloat16)}
    unpacked, packed = 2 * 16 * 64 * 2, 2 * (16 * 64 // 2 + 16 * 2)
    assert bytes_at_hand(module, torch.device("cpu"), offloaded=False) == unpacked
    assert bytes_at_hand(module, torch.device("cpu"), offloaded=True) == unpacked + 2 * packed
    monkeypatch.setattr(expert_groups, "WEIGHTS_ON_CPU", 1 << 24)  # one group of all experts needs one buffer
    unpacked, packed = 3 * unpacked, 3 * packed
    assert bytes_at_hand(module, torch.device("cpu"), offloaded=True) == unpacked + packed
