"""Keeps fewer activations for the backward pass: those that are cheap to compute again are computed again.

Autograd keeps what each operation needs for its gradient. In a block of a transformer, about half of that are results
of elementwise operations: inputs of norms cast to float32, outputs of norms, of activation functions and of their
products. Here each such tensor is kept as the function and the operands that it came from:

    kept:       results of products, of attention, and of sums, such as the hidden states between blocks,
    recomputed: casts, norms, activation functions, elementwise products, copies.

The backward pass calls the same functions on the same operands, so gradients are the same to the last bit. Unlike
gradient checkpointing, no product of matrices is computed twice, and nothing is computed that is not needed. Where
memory counts more, the outputs of linears with adapters are recomputed too; then attention alone is not computed twice.

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

from loftq.models.recorded_tensors import Computed, Leaf, Recomputed, View, address_of, layout_of, reference_to

_SMALL = 1 << 16  # bytes up to which a tensor is kept as it is
_NODE = "_computed_by"  # the attribute of a tensor that keeps its record alive
_FUNCTIONAL = ("silu", "gelu", "sigmoid", "tanh", "logsigmoid", "softplus", "layer_norm", "rms_norm")
_METHODS = (
    *("to", "float", "bfloat16", "half", "type_as", "contiguous", "clone", "reshape", "flatten"),
    *("mul", "__mul__", "__rmul__", "div", "__truediv__", "pow", "__pow__", "square", "neg", "__neg__", "abs"),
    *("sigmoid", "tanh", "rsqrt", "exp"),
)
_SUMS = ("add", "sub", "__add__", "__radd__", "__sub__", "__rsub__", "cat")


def _functions(names: Sequence[str], *places: Any) -> set[Any]:
    return {getattr(place, name) for place in places for name in names if hasattr(place, name)}


_CHEAP = _functions(_FUNCTIONAL, nn.functional) | _functions(_METHODS, torch, torch.Tensor)
_CHEAP_SUMS = _functions(_SUMS, torch, torch.Tensor)


class _Recorder(TorchFunctionMode):
    """Records the results of cheap functions, and decides what autograd keeps."""

    def __init__(self, products: bool) -> None:
        super().__init__()
        self._products = products
        self._computed: weakref.WeakValueDictionary[int, Computed] = weakref.WeakValueDictionary()
        self._kept: dict[int, StorageWeakRef] = {}
        self._recomputed: weakref.WeakSet[Recomputed] = weakref.WeakSet()

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
        address = address_of(tensor)
        computed = None if address in self._kept else self._record_of(tensor)
        if computed is not None:
            leaves = list(computed.leaves())
            if all(leaf.is_unchanged() for leaf in leaves):
                fresh = {address_of(leaf.tensor): leaf.tensor for leaf in leaves if not self._is_held(leaf.tensor)}
                if sum(leaf.untyped_storage().nbytes() for leaf in fresh.values()) < tensor.untyped_storage().nbytes():
                    for leaf in fresh.values():
                        self._hold(leaf)
                    recomputed = Recomputed(computed, layout_of(tensor))
                    self._recomputed.add(recomputed)
                    return recomputed
        self._hold(tensor)
        return tensor

    def _is_held(self, tensor: torch.Tensor) -> bool:
        return address_of(tensor) in self._kept

    def _hold(self, tensor: torch.Tensor) -> None:
        address = address_of(tensor)
        if address not in self._kept:
            self._kept[address] = reference_to(tensor)

    def _record_of(self, tensor: torch.Tensor) -> Computed | None:
        computed = self._computed.get(address_of(tensor))
        return computed if computed is not None and computed.version == tensor._version else None

    def _keep_record(self, tensor: torch.Tensor) -> bool:
        """Let a tensor keep the record of its memory alive, if there is one."""
        computed = self._computed.get(address_of(tensor))
        if computed is None:
            return False
        setattr(tensor, _NODE, computed)
        return True

    def _note(self, result: torch.Tensor, func: Any, args: Any, kwargs: Any) -> None:
        if not self._keep_record(result) and (func in _CHEAP or func in _CHEAP_SUMS):
            tensors = list(_tensors([*args, *kwargs.values()]))
            if func in _CHEAP or len(tensors) == 1 or (self._products and all(map(self._record_of, tensors))):
                self._record(result, func, args, kwargs)

    def note_product(self, result: torch.Tensor, function: Callable[..., torch.Tensor], operand: torch.Tensor) -> None:
        """Record the result of a function that computes products of matrices, if these are recomputed."""
        if self._products and _is_plain(result):
            self._record(result, function, (operand,), {})

    def _record(self, result: torch.Tensor, func: Any, args: Any, kwargs: Any) -> None:
        storage = result.untyped_storage()
        if storage.nbytes() <= _SMALL or storage.nbytes() != result.numel() * result.itemsize:
            return
        tensors = _tensors([*args, *kwargs.values()])
        if not all(
            _is_plain(part) and address_of(part) != storage._cdata for part in tensors
        ):  # views have its address
            return
        operands = [self._operand(part) for part in args]
        computed = Computed(result, func, operands, {name: self._operand(part) for name, part in kwargs.items()})
        self._computed[storage._cdata] = computed
        setattr(result, _NODE, computed)

    def _operand(self, part: Any) -> Any:
        if isinstance(part, (tuple, list)):
            return [self._operand(member) for member in part]
        if not isinstance(part, torch.Tensor):
            return part
        origin = None if self._is_held(part) else self._record_of(part)
        return Leaf(part) if origin is None else View(part, origin)

    def _before_change(self, tensor: Any) -> None:
        """Compute what came from a tensor before it changes."""
        if not _is_plain(tensor):
            return
        address = address_of(tensor)
        self._computed.pop(address, None)
        if address in self._kept:
            for recomputed in list(self._recomputed):
                if any(address_of(leaf.tensor) == address for leaf in recomputed.computed.leaves()):
                    recomputed.compute_now()


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor with memory of its own: not sparse, of no wrapping class, not within vmap."""
    if type(value) not in (torch.Tensor, nn.Parameter) or value.layout != torch.strided:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(value)


def _tensors(parts: Any) -> Iterator[torch.Tensor]:
    for part in parts:
        if isinstance(part, torch.Tensor):
            yield part
        elif isinstance(part, (tuple, list)):
            yield from _tensors(part)


def _is_in_place(func: Any, kwargs: Mapping[str, Any]) -> bool:
    name: str = getattr(func, "__name__", "")
    if kwargs.get("out") is not None or kwargs.get("inplace"):
        return True
    if name.endswith("__"):
        return name in _IN_PLACE
    return name.endswith("_")


_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
_IN_PLACE.add("__setitem__")


_active: list[_Recorder] = []


@contextmanager
def recomputing_cheap_activations(*, products: bool = False) -> Iterator[Callable[[torch.Tensor], Any]]:
    """Within this context, a forward pass keeps cheap activations as the functions that they came from.

    With `products`, those of `computing_product` are recomputed too, and sums of what is recomputed.
    """
    recorder = _Recorder(products)
    hooks = torch.autograd.graph.saved_tensors_hooks(recorder.pack, _unpack)
    _active.append(recorder)
    try:
        with hooks, recorder:
            yield recorder.pack
    finally:
        _active.pop()


def computing_product(function: Callable[[torch.Tensor], torch.Tensor], operand: torch.Tensor) -> torch.Tensor:
    """The result of a function that computes products of matrices with a tensor, which may be recomputed."""
    result = function(operand)
    if _active and torch.is_grad_enabled():
        _active[-1].note_product(result, function, operand)
    return result


def keeping_less(device: torch.device, *, products: bool = False) -> AbstractContextManager[Any]:
    """`recomputing_cheap_activations` on a CPU, where it takes next to no time. On other devices, nothing changes.

    The functions take less time on a GPU than recording them does.
    """
    return recomputing_cheap_activations(products=products) if device.type == "cpu" else nullcontext()


def kept_tensors(kept: Any) -> list[torch.Tensor]:
    """The tensors that autograd holds for what it keeps in the place of one."""
    return [leaf.tensor for leaf in kept.computed.leaves()] if isinstance(kept, Recomputed) else [kept]


def _unpack(kept: Any) -> torch.Tensor:
    return kept.unpack() if isinstance(kept, Recomputed) else kept
