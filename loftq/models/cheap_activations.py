"""Keeps fewer activations for the backward pass: those that are cheap to compute again are computed again.

Autograd keeps what each operation needs for its gradient. In a block of a transformer, about half of that are results
of elementwise operations: inputs of norms cast to float32, outputs of norms, of activation functions and of their
products. Here each such tensor is kept as the function and the operands that it came from:

    kept:       results of products, of attention, and of sums, such as the hidden states between blocks,
    recomputed: casts, norms, activation functions, elementwise products, copies.

The backward pass calls the same functions on the same operands, so gradients are the same to the last bit. Unlike
gradient checkpointing, no product of matrices is computed twice, and nothing is computed that is not needed.

A tensor is recognized by its memory, because autograd hands out aliases. It is recomputed only if fewer bytes are kept
so. An operand that a model changes in place later is no longer one: what came from it is computed before the change.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

_SMALL = 1 << 16  # bytes up to which a tensor is kept as it is
_NODE = "_computed_by"  # the attribute of a tensor that keeps its record alive
_FUNCTIONAL = ("silu", "gelu", "sigmoid", "tanh", "logsigmoid", "softplus", "layer_norm", "rms_norm")
_METHODS = (
    *("to", "float", "bfloat16", "half", "type_as", "contiguous", "clone", "reshape", "flatten"),
    *("mul", "__mul__", "__rmul__", "div", "__truediv__", "pow", "__pow__", "square", "neg", "__neg__", "abs"),
    *("sigmoid", "tanh", "rsqrt", "exp"),
)
_WITH_NUMBERS = ("add", "sub", "__add__", "__radd__", "__sub__", "__rsub__")  # sums of tensors are kept


def _functions(names: Sequence[str], *places: Any) -> set[Any]:
    return {getattr(place, name) for place in places for name in names if hasattr(place, name)}


_CHEAP = _functions(_FUNCTIONAL, nn.functional) | _functions(_METHODS, torch, torch.Tensor)
_CHEAP_WITH_NUMBERS = _functions(_WITH_NUMBERS, torch, torch.Tensor)


def _address(tensor: torch.Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


Layout = tuple[torch.Size, tuple[int, ...], int]


def _layout(tensor: torch.Tensor) -> Layout:
    return tensor.shape, tensor.stride(), int(tensor.storage_offset())


class _Leaf:
    """A tensor that a function was called with, and its version, which counts the times that it was written to."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version

    def value(self) -> torch.Tensor:
        if not self.is_unchanged():
            raise RuntimeError("a tensor that is needed for the backward pass was changed in place")
        return self.tensor

    def is_unchanged(self) -> bool:
        return self.tensor._version == self.version


class _Part:
    """A tensor that a function was called with, by its layout in the result of another recorded function."""

    def __init__(self, tensor: torch.Tensor, origin: _Computed) -> None:
        self.origin, self.layout = origin, _layout(tensor)

    def value(self) -> torch.Tensor:
        return _view(self.origin.value(), self.layout)


def _view(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    return tensor if _layout(tensor) == layout else tensor.as_strided(*layout)


class _Computed:
    """How a tensor was computed. Its value is held only while more than one operation of the backward pass needs it."""

    def __init__(self, result: torch.Tensor, function: Any, operands: list[Any], named: dict[str, Any]) -> None:
        self.function, self.operands, self.named = function, operands, named
        self.memory = _reference(result)  # while it lives, no other memory gets this address
        self.version = result._version
        kind = result.device.type
        self.autocast = None
        if torch.amp.is_autocast_available(kind):
            self.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        self.uses = 0
        self._value: torch.Tensor | None = None

    def value(self) -> torch.Tensor:
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

    def leaves(self) -> Iterator[_Leaf]:
        """The operands that are kept."""
        for part in (*self.operands, *self.named.values()):
            if isinstance(part, _Leaf):
                yield part
            elif isinstance(part, _Part):
                yield from part.origin.leaves()


def _value(part: Any) -> Any:
    return part.value() if isinstance(part, (_Leaf, _Part)) else part


def _reference(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


class _Recomputed:
    """What autograd keeps in the place of a tensor."""

    def __init__(self, computed: _Computed, layout: Layout) -> None:
        self.computed, self.layout = computed, layout
        self.tensor: torch.Tensor | None = None
        computed.uses += 1

    def compute_now(self) -> None:
        self.tensor = self.unpack()

    def unpack(self) -> torch.Tensor:
        if self.tensor is not None:
            return self.tensor
        with torch.no_grad():
            return _view(self.computed.use(), self.layout)


class _Recorder(TorchFunctionMode):
    """Records the results of cheap functions, and decides what autograd keeps."""

    def __init__(self) -> None:
        super().__init__()
        self._computed: weakref.WeakValueDictionary[int, _Computed] = weakref.WeakValueDictionary()
        self._kept: dict[int, StorageWeakRef] = {}
        self._recomputed: weakref.WeakSet[_Recomputed] = weakref.WeakSet()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_in_place(func, kwargs):
            self._before_change(kwargs.get("out", args[0] if args else None))
        result = func(*args, **kwargs)
        if not torch.is_grad_enabled():
            return result
        if _is_plain(result):
            self._note(result, func, args, kwargs)
        elif isinstance(result, (tuple, list)):
            for part in filter(_is_plain, result):
                self._keep_record(part)
        return result

    def pack(self, tensor: torch.Tensor) -> Any:
        """What autograd keeps of a tensor."""
        if not _is_plain(tensor):
            return tensor
        address = _address(tensor)
        computed = None if address in self._kept else self._record_of(tensor)
        if computed is not None:
            leaves = list(computed.leaves())
            if all(leaf.is_unchanged() for leaf in leaves):
                fresh = {_address(leaf.tensor): leaf.tensor for leaf in leaves if not self._is_held(leaf.tensor)}
                if sum(leaf.untyped_storage().nbytes() for leaf in fresh.values()) < tensor.untyped_storage().nbytes():
                    for leaf in fresh.values():
                        self._hold(leaf)
                    recomputed = _Recomputed(computed, _layout(tensor))
                    self._recomputed.add(recomputed)
                    return recomputed
        self._hold(tensor)
        return tensor

    def _is_held(self, tensor: torch.Tensor) -> bool:
        return _address(tensor) in self._kept

    def _hold(self, tensor: torch.Tensor) -> None:
        address = _address(tensor)
        if address not in self._kept:
            self._kept[address] = _reference(tensor)

    def _record_of(self, tensor: torch.Tensor) -> _Computed | None:
        computed = self._computed.get(_address(tensor))
        return computed if computed is not None and computed.version == tensor._version else None

    def _keep_record(self, tensor: torch.Tensor) -> bool:
        """Let a tensor keep the record of its memory alive, if there is one."""
        computed = self._computed.get(_address(tensor))
        if computed is None:
            return False
        setattr(tensor, _NODE, computed)
        return True

    def _note(self, result: torch.Tensor, func: Any, args: Any, kwargs: Any) -> None:
        if self._keep_record(result) or not _is_cheap(func, (*args, *kwargs.values())):
            return
        storage = result.untyped_storage()
        if storage.nbytes() <= _SMALL or storage.nbytes() != result.numel() * result.itemsize:
            return
        tensors = [part for part in (*args, *kwargs.values()) if isinstance(part, torch.Tensor)]
        if not all(_is_plain(part) and _address(part) != storage._cdata for part in tensors):  # views have its address
            return
        operands = [self._operand(part) for part in args]
        computed = _Computed(result, func, operands, {name: self._operand(part) for name, part in kwargs.items()})
        self._computed[storage._cdata] = computed
        setattr(result, _NODE, computed)

    def _operand(self, part: Any) -> Any:
        if not isinstance(part, torch.Tensor):
            return part
        origin = None if self._is_held(part) else self._record_of(part)
        return _Leaf(part) if origin is None else _Part(part, origin)

    def _before_change(self, tensor: Any) -> None:
        """Compute what came from a tensor before it changes."""
        if not _is_plain(tensor):
            return
        address = _address(tensor)
        self._computed.pop(address, None)
        if address in self._kept:
            for recomputed in list(self._recomputed):
                if any(_address(leaf.tensor) == address for leaf in recomputed.computed.leaves()):
                    recomputed.compute_now()


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor with memory of its own, not sparse and of no class that wraps others."""
    return type(value) in (torch.Tensor, nn.Parameter) and value.layout == torch.strided


def _is_cheap(func: Any, operands: Sequence[Any]) -> bool:
    if func in _CHEAP_WITH_NUMBERS:
        return sum(isinstance(part, torch.Tensor) for part in operands) == 1
    return func in _CHEAP


def _is_in_place(func: Any, kwargs: Mapping[str, Any]) -> bool:
    name: str = getattr(func, "__name__", "")
    if kwargs.get("out") is not None or kwargs.get("inplace"):
        return True
    if name.endswith("__"):
        return name in _IN_PLACE
    return name.endswith("_")


_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
_IN_PLACE.add("__setitem__")


@contextmanager
def recomputing_cheap_activations() -> Iterator[Callable[[torch.Tensor], Any]]:
    """Within this context, a forward pass keeps cheap activations as the functions that they came from."""
    recorder = _Recorder()
    hooks = torch.autograd.graph.saved_tensors_hooks(recorder.pack, _unpack)
    with hooks, recorder:
        yield recorder.pack


def keeping_less(device: torch.device) -> AbstractContextManager[Any]:
    """`recomputing_cheap_activations` on a CPU, where it takes next to no time. On other devices, nothing changes.

    The functions take less time on a GPU than recording them does.
    """
    return recomputing_cheap_activations() if device.type == "cpu" else nullcontext()


def kept_tensors(kept: Any) -> list[torch.Tensor]:
    """The tensors that autograd holds for what it keeps in the place of one."""
    return [leaf.tensor for leaf in kept.computed.leaves()] if isinstance(kept, _Recomputed) else [kept]


def _unpack(kept: Any) -> torch.Tensor:
    return kept.unpack() if isinstance(kept, _Recomputed) else kept
