"""What a public function takes and returns, read from the function itself."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class PublicFunction:
    """A function, or a class that is called, with its keywords.

    Those of `**settings: Unpack[SomeTypedDict]` are listed one by one.
    """

    name: str
    function: Callable[..., Any]

    @property
    def text(self) -> str:
        """The call, one parameter on a line."""
        lines = "".join(f"    {line},\n" for line in self._lines())
        call = f"{self.name}(\n{lines})"
        if isinstance(self.function, type):
            return call
        return f"{call} -> {_annotation(inspect.signature(self.function).return_annotation)}"

    @property
    def keywords(self) -> list[str]:
        """The names of all parameters."""
        return [name for parameter in self._parameters for name in self._unpacked(parameter)]

    @property
    def result(self) -> type | None:
        """What is returned, where that is a dataclass of ours."""
        returns = inspect.signature(self.function).return_annotation
        kind = self._namespace.get(returns) if isinstance(returns, str) else returns
        return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None

    @property
    def _parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.function).parameters.values())

    @cached_property
    def _namespace(self) -> dict[str, Any]:
        """The names that annotations may use: those of the module, and its imports for type checkers."""
        module = sys.modules[self.function.__module__]
        namespace = dict(vars(module))
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                exec(compile(ast.Module(node.body, []), str(module.__file__), "exec"), namespace)
        return namespace

    def _lines(self) -> Iterator[str]:
        keywords_began = False
        for parameter in self._parameters:
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD) and not keywords_began:
                yield "*"
            keywords_began |= parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
            default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
            yield from (f"{name}: {kind}{default}" for name, kind in self._unpacked(parameter).items())

    def _unpacked(self, parameter: inspect.Parameter) -> dict[str, str]:
        """Names with their types: one, or the keys of the TypedDict that `**` stands for."""
        annotation = parameter.annotation
        if parameter.kind is parameter.VAR_KEYWORD:
            unpack = eval(annotation, self._namespace) if isinstance(annotation, str) else annotation
            (keys,) = typing.get_args(unpack) or (None,)
            if typing.is_typeddict(keys):
                return {name: _annotation(kind) for name, kind in keys.__annotations__.items()}
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        return {f"{stars}{parameter.name}": _annotation(annotation)}


def attributes(kind: type) -> list[tuple[str, str]]:
    """The fields of a dataclass with their types, then its public properties with their first sentences."""
    fields = [(field.name, f"`{_annotation(field.type)}`") for field in dataclasses.fields(kind)]
    properties = [(name, value) for name, value in vars(kind).items() if isinstance(value, property) and name[0] != "_"]
    return fields + [(name, " ".join((value.__doc__ or "").split())) for name, value in properties]


def _annotation(annotation: Any) -> str:
    if isinstance(annotation, typing.ForwardRef):
        return annotation.__forward_arg__
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
