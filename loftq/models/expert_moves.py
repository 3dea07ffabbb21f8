"""The packed experts of each group at hand, on the device of the tokens, also where main memory holds them.

Experts that are held in main memory (`expert_offload`) are copied to the device one group at a time, forward and again
backward. Where the device has streams, the next group is copied while a group is computed. There are two buffers, and
a copy waits until the group that was in its buffer before has been computed: so the device never holds more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from loftq.models.expert_groups import Group, PackedStack, Stored, group_size, runs

BUFFERS = 2  # groups whose codes and scales are on the device at a time


def groups_at_hand(
    module: Any, groups: Sequence[Group], device: torch.device
) -> Iterator[tuple[Group, dict[str, Stored]]]:
    """Each group with the codes and scales of its experts on a device, by the name of the parameter.

    They are only there until the next group is asked for.
    """
    held: dict[str, Stored] = {name: module.stored(name) for name in module.packed_stacks}
    if module.offloaded:
        yield from _moved(held, groups, device)
        return
    for group in groups:
        yield group, {name: [None if t is None else group.take(t) for t in stored] for name, stored in held.items()}


def _moved(
    held: Mapping[str, Stored], groups: Sequence[Group], device: torch.device
) -> Iterator[tuple[Group, dict[str, Stored]]]:
    size = max((len(group.experts) for group in groups), default=0)
    buffers = [_buffer(held, size, device) for _ in groups[:BUFFERS]]
    streams = _Streams(device)
    copied = None
    for i, group in enumerate(groups):
        stored = _copy(held, group, buffers[0], streams) if copied is None else copied
        streams.wait_for_copies()
        if i + 1 < len(groups):
            copied = _copy(held, groups[i + 1], buffers[(i + 1) % BUFFERS], streams)
        yield group, stored


class _Streams:
    """The stream that computes, and one beside it that copies, where the device has streams."""

    def __init__(self, device: torch.device) -> None:
        backend = torch.get_device_module(device)
        streams = hasattr(backend, "Stream")  # those of a CPU exist, and do nothing
        self._computing = backend.current_stream(device) if streams else None
        self._copying = backend.Stream(device) if streams else None
        self._enter = backend.stream if streams else nullcontext

    def copying(self) -> Any:
        """The context in which copies are made, after all that was computed so far."""
        if self._copying is not None:
            self._copying.wait_stream(self._computing)
        return self._enter(self._copying)

    def wait_for_copies(self) -> None:
        """Let the computation wait for the copies that were made so far."""
        if self._computing is not None:
            self._computing.wait_stream(self._copying)


def _buffer(held: Mapping[str, Stored], size: int, device: torch.device) -> dict[str, Stored]:
    """Room for the codes and scales of so many experts."""
    return {
        name: [None if t is None else torch.empty((size, *t.shape[1:]), dtype=t.dtype, device=device) for t in stored]
        for name, stored in held.items()
    }


def _copy(
    held: Mapping[str, Stored], group: Group, buffer: Mapping[str, Stored], streams: _Streams
) -> dict[str, Stored]:
    """Copy a group's codes and scales into a buffer, one copy for each run of consecutive experts."""
    copies: dict[str, Stored] = {}
    with streams.copying():
        for name, stored in held.items():
            parts: list[torch.Tensor | None] = []
            for source, target in zip(stored, buffer[name], strict=True):
                if source is None or target is None:
                    parts.append(None)
                    continue
                place = 0
                for first, last in runs(group.experts):
                    target[place : place + last - first].copy_(source[first:last], non_blocking=True)
                    place += last - first
                parts.append(target[:place])
            copies[name] = parts
    return copies


def bytes_at_hand(module: Any, device: torch.device, *, offloaded: bool) -> int:
    """Bytes on a device for the packed experts of a module while a group is computed, besides those that lie there.

    They are the unpacked weights of a group and, if the experts are offloaded, the groups in the buffers.
    """
    stacks: Mapping[str, PackedStack] = module.packed_stacks
    experts = next(iter(stacks.values())).shape[0]
    size = min(group_size(stacks, device), experts)
    unpacked = sum(size * stack.shape[1] * stack.shape[2] * stack.compute_dtype.itemsize for stack in stacks.values())
    packed: int = sum(tensor.nbytes for tensor in module.packed_tensors().values()) * size // experts
    buffers = min(BUFFERS, -(-experts // size)) if offloaded else 0
    return unpacked + buffers * packed
