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
from contextlib import contextmanager
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
    return tensor.shape, tensor.stride(), tensor.storage_offset()


class _Operand:
    """A tensor that a function was called with: itself, or its layout in the result of another recorded function."""

    def __init__(self, tensor: torch.Tensor, origin: _Computed | None) -> None:
        self.origin, self.layout = origin, _layout(tensor)
        self.tensor = tensor.detach() if origin is None else None
        self.version = tensor._version

    def value(self) -> torch.Tensor:
        if self.tensor is None:
            assert self.origin is not None
            return _view(self.origin.value(), self.layout)
        if not self.is_unchanged():
            raise RuntimeError("a tensor that is needed for the backward pass was changed in place")
        return self.tensor

    def is_unchanged(self) -> bool:
        return self.tensor is None or self.tensor._version == self.version


def _view(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    return tensor if _layout(tensor) == layout else tensor.as_strided(*layout)


class _Computed:
    """How a tensor was computed. Its value is held only while more than one operation of the backward pass needs it."""

    def __init__(self, result: torch.Tensor, function: Any, operands: Sequence[Any], named: Mapping[str, Any]) -> None:
        self.function, self.operands, self.named = function, operands, named
        self.memory = StorageWeakRef(result.untyped_storage())  # while it lives, no other memory gets this address
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
        plain = [part.value() if isinstance(part, _Operand) else part for part in self.operands]
        if self.autocast is None:
            value: torch.Tensor = self.function(*plain, **self.named)
        else:
            kind, dtype, enabled = self.autocast
            with torch.autocast(kind, dtype, enabled):
                value = self.function(*plain, **self.named)
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

    def leaves(self) -> Iterator[_Operand]:
        """The operands that are kept."""
        for part in self.operands:
            if isinstance(part, _Operand):
                if part.origin is None:
                    yield part
                else:
                    yield from part.origin.leaves()


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

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if _is_in_place(func, kwargs):
            self._before_change(kwargs.get("out", args[0] if args else None))
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            self._note(result, func, args, kwargs)
        elif isinstance(result, (tuple, list)):
            for part in result:
                if isinstance(part, torch.Tensor):
                    self._keep_record(part)
        return result

    def pack(self, tensor: torch.Tensor) -> Any:
        """What autograd keeps of a tensor."""
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
        storage = tensor.untyped_storage()
        if storage._cdata not in self._kept:
            self._kept[storage._cdata] = StorageWeakRef(storage)

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
        if result.device.type != "meta" and result.is_sparse:
            return
        if self._keep_record(result) or not _is_cheap(func, args, kwargs):
            return
        storage = result.untyped_storage()
        if storage.nbytes() <= _SMALL or storage.nbytes() != result.numel() * result.itemsize:
            return
        tensors = [part for part in args if isinstance(part, torch.Tensor)]
        if any(_address(part) == storage._cdata for part in tensors):  # a view, or the same tensor
            return
        operands = [
            _Operand(part, self._record_of(part)) if isinstance(part, torch.Tensor) else part for part in args
        ]
        computed = _Computed(result, func, operands, kwargs)
        self._computed[storage._cdata] = computed
        setattr(result, _NODE, computed)

    def _before_change(self, tensor: Any) -> None:
        """Compute what came from a tensor before it changes."""
        if not isinstance(tensor, torch.Tensor):
            return
        address = _address(tensor)
        self._computed.pop(address, None)
        if address in self._kept:
            for recomputed in list(self._recomputed):
                if any(_address(leaf.tensor) == address for leaf in recomputed.computed.leaves()):
                    recomputed.compute_now()


def _is_cheap(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if any(isinstance(part, torch.Tensor) for part in kwargs.values()):
        return False
    if func in _CHEAP_WITH_NUMBERS:
        return sum(isinstance(part, torch.Tensor) for part in args) == 1
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


def keeps_less(device: torch.device) -> bool:
    """Whether training on a device recomputes cheap activations: on a CPU, where that takes next to no time.

    On a GPU, the functions are short, and recording them would take longer than many of them.
    """
    return device.type == "cpu"


@contextmanager
def recomputing_cheap_activations() -> Iterator[Callable[[torch.Tensor], Any]]:
    """Within this context, a forward pass keeps cheap activations as the functions that they came from."""
    recorder = _Recorder()
    hooks = torch.autograd.graph.saved_tensors_hooks(recorder.pack, _unpack)
    with hooks, recorder:
        yield recorder.pack


def _unpack(kept: Any) -> torch.Tensor:
    return kept.unpack() if isinstance(kept, _Recomputed) else kept
