"""Records of how tensors were computed, from which the backward pass computes them again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef


def address_of(tensor: torch.Tensor) -> int:
    """A number that the memory of a tensor has alone as long as it lives."""
    address: int = tensor.untyped_storage()._cdata
    return address


Layout = tuple[torch.Size, tuple[int, ...], int]


def layout_of(tensor: torch.Tensor) -> Layout:
    """The shape of a tensor, its strides, and where it begins in its memory."""
    return tensor.shape, tensor.stride(), int(tensor.storage_offset())


class Leaf:
    """A tensor that a function was called with, and its version, which counts the times that it was written to."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version

    def value(self) -> torch.Tensor:
        """The tensor. Raises RuntimeError if it was changed in place."""
        if not self.is_unchanged():
            raise RuntimeError("a tensor that is needed for the backward pass was changed in place")
        return self.tensor

    def is_unchanged(self) -> bool:
        """Whether the tensor was not written to since."""
        return self.tensor._version == self.version


class View:
    """A tensor that a function was called with, by its layout in the result of another recorded function."""

    def __init__(self, tensor: torch.Tensor, origin: Computed) -> None:
        self.origin, self.layout = origin, layout_of(tensor)

    def value(self) -> torch.Tensor:
        """The tensor, computed again."""
        return _view(self.origin.value(), self.layout)


def _view(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    return tensor if layout_of(tensor) == layout else tensor.as_strided(*layout)


class Computed:
    """How a tensor was computed. Its value is held only while more than one operation of the backward pass needs it."""

    def __init__(self, result: torch.Tensor, function: Any, operands: list[Any], named: dict[str, Any]) -> None:
        self.function, self.operands, self.named = function, operands, named
        self.memory = reference_to(result)  # while it lives, no other memory gets this address
        self.version = result._version
        kind = result.device.type
        self.autocast = None
        if torch.amp.is_autocast_available(kind):
            self.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        self.uses = 0
        self._value: torch.Tensor | None = None

    def value(self) -> torch.Tensor:
        """The result, computed again unless it is held."""
        if self._value is not None:
            return self._value
        plain = [_value(part) for part in self.operands]
        named = {name: _value(part) for name, part in self.named.items()}
        with nullcontext() if self.autocast is None else torch.autocast(*self.autocast):
            value: torch.Tensor = self.function(*plain, **named)
        if self.uses:
            self._value = value
        return value

    def use(self) -> torch.Tensor:
        """The value, for one of the operations that need it."""
        self.uses = max(self.uses - 1, 0)
        value = self.value()
        if not self.uses:
            self._value = None
        return value

    def leaves(self) -> Iterator[Leaf]:
        """The operands that are kept."""
        yield from _leaves([*self.operands, *self.named.values()])


def _value(part: Any) -> Any:
    if isinstance(part, (tuple, list)):
        return [_value(member) for member in part]
    return part.value() if isinstance(part, (Leaf, View)) else part


def _leaves(part: Any) -> Iterator[Leaf]:
    if isinstance(part, (tuple, list)):
        for member in part:
            yield from _leaves(member)
    elif isinstance(part, Leaf):
        yield part
    elif isinstance(part, View):
        yield from part.origin.leaves()


def reference_to(tensor: torch.Tensor) -> StorageWeakRef:
    """A weak reference to the memory of a tensor."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


class Recomputed:
    """What autograd keeps in the place of a tensor."""

    def __init__(self, computed: Computed, layout: Layout) -> None:
        self.computed, self.layout = computed, layout
        self.tensor: torch.Tensor | None = None
        computed.uses += 1

    def compute_now(self) -> None:
        """Compute the tensor, and hold it until it is needed."""
        self.tensor = self.unpack()

    def unpack(self) -> torch.Tensor:
        """The tensor, for the backward pass."""
        if self.tensor is not None:
            return self.tensor
        with torch.no_grad():
            return _view(self.computed.use(), self.layout)
