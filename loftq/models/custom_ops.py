"""Functions of tensors as operators of torch's dispatcher: compilers, fake tensors and the meta device take them whole.

`torch.library.custom_op` does the same with checks around each call, which take longer than a kernel on a GPU does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch

_LIBRARY = torch.library.Library("loftq", "FRAGMENT")  # type: ignore[no-untyped-call]
_PLAIN = (torch.Tensor, torch.nn.Parameter)
P = ParamSpec("P")
R = TypeVar("R")


class Operator(Generic[P, R]):
    """A function whose first argument is a tensor, and which changes none and returns none of those that it gets."""

    def __init__(self, function: Callable[P, R]) -> None:
        name = function.__name__.lstrip("_")
        self._function = function
        self._name = f"loftq::{name}"
        library: Any = _LIBRARY  # whose methods have no types
        library.define(name + torch.library.infer_schema(function, mutates_args=()))
        library.impl(name, function, "CompositeExplicitAutograd")
        self._dispatched: Callable[P, R] = getattr(torch.ops.loftq, name).default

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function itself, where nothing but a result is wanted."""
        first: Any = args[0]
        if type(first) in _PLAIN and not first.is_meta and not torch.compiler.is_compiling():
            return self._function(*args, **kwargs)
        return self._dispatched(*args, **kwargs)

    def register_fake(self, function: Callable[P, R]) -> Callable[P, R]:
        """Say what shapes come out."""
        torch.library.register_fake(self._name, function, lib=_LIBRARY)
        return function
