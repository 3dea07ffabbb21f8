"""Tables whose rows are imported when they are read, so that names alone, for a help text or a check, cost nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar

_Row = TypeVar("_Row")


class LazyTable(Mapping[str, _Row], Generic[_Row]):
    """Rows by name. `places` says where each is found: `module`, or `module:attribute`."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = dict(places)

    def __getitem__(self, name: str) -> _Row:
        module, _, attribute = self._places[name].partition(":")
        row: Any = import_module(module)
        return getattr(row, attribute) if attribute else row  # type: ignore[no-any-return]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
