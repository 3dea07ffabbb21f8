"""Functions of tensors as operators of torch's dispatcher, so that compilers, fake tensors and the meta device do not
look inside them.

`torch.library.custom_op` does the same, but its checks at each call take longer than a kernel on a GPU.
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
    """A function as an operator. Its first argument is a tensor; it neither changes nor returns its arguments."""

    def __init__(self, function: Callable[P, R]) -> None:
        name = function.__name__.lstrip("_")
        self._function = function
        self._name = f"loftq::{name}"
        library: Any = _LIBRARY  # its methods have no types
        library.define(name + torch.library.infer_schema(function, mutates_args=()))
        library.impl(name, function, "CompositeExplicitAutograd")
        self._dispatched: Callable[P, R] = getattr(torch.ops.loftq, name).default

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function itself, or torch's operator if the call is compiled or a tensor is a special one."""
        first: Any = args[0]
        if type(first) in _PLAIN and not first.is_meta and not torch.compiler.is_compiling():
            return self._function(*args, **kwargs)
        return self._dispatched(*args, **kwargs)

    def register_fake(self, function: Callable[P, R]) -> Callable[P, R]:
        """Register a function that computes only the shapes and dtypes of the results."""
        torch.library.register_fake(self._name, function, lib=_LIBRARY)
        return function
