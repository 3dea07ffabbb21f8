"""Which modules stock transformers leaves unconverted, for a list of patterns as long as the list of modules.

transformers matches each name with each pattern (`should_convert_module`): a pattern is a regular expression that
matches a name from its start to a boundary between modules, or the end of the name. Patterns that are names themselves
differ from plain text only in their dots, which match any character. So those of one length, with dots in the same
places, are found in a set, and a name is looked up once for each such form instead of once for each pattern.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_NAME = re.compile(r"[\w.]*", re.ASCII)
_ANY = "."  # any character, in a regular expression


class Skipped:
    """A list of patterns, in the form of `llm_int8_skip_modules`."""

    def __init__(self, patterns: Collection[str]) -> None:
        names = {pattern for pattern in patterns if _NAME.fullmatch(pattern)}
        self._others = [pattern for pattern in patterns if pattern not in names]
        self._ends: dict[int, set[str]] = {}
        self._starts: dict[tuple[int, tuple[int, ...]], set[str]] = {}
        for name in names:
            self._ends.setdefault(len(name), set()).add(name)
            dots = tuple(at for at, letter in enumerate(name) if letter == ".")
            self._starts.setdefault((len(name), dots), set()).add(name)

    def holds(self, name: str) -> bool:
        """Whether transformers leaves a module of this name as it is."""
        if any(name[len(name) - length :] in ends for length, ends in self._ends.items() if length <= len(name)):
            return True
        for (length, dots), starts in self._starts.items():
            if _is_boundary(name, length) and _with_dots(name[:length], dots) in starts:
                return True
        return not _converted(name, self._others)


def _is_boundary(name: str, at: int) -> bool:
    """Whether a module's name may end before a position: at the end of the name, before a dot or after one."""
    if at >= len(name):
        return at == len(name)
    return name[at] == "." or (at > 0 and name[at - 1] == ".")


def _with_dots(text: str, places: tuple[int, ...]) -> str:
    """A text with dots in some places."""
    if all(text[at] == _ANY for at in places):
        return text
    letters = list(text)
    for at in places:
        letters[at] = _ANY
    return "".join(letters)


def _converted(name: str, patterns: list[str]) -> bool:
    from transformers.quantizers.quantizers_utils import should_convert_module

    return bool(should_convert_module(name, patterns))
