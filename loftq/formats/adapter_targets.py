"""The names by which peft finds what an adapter adapts: those of modules, and those of parameters of fused experts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from loftq.errors import OptionError


def target_names(targets: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The shortest list of names with which peft finds exactly the `targets` among the `modules` of a model.

    The list has last components (`q_proj`) if they are unambiguous, full names otherwise. peft also matches modules
    whose name ends with a listed name. Raises OptionError if even the full names match other modules.
    """
    target_set, existing = set(targets), list(modules)
    suffixes = {name.rpartition(".")[2] for name in target_set}
    for names in (suffixes, target_set):
        unwanted = {name for name in existing if any(end in names for end in _ends(name))} - target_set
        if not unwanted:
            return sorted(names)
    raise OptionError(
        f"peft cannot adapt the targets without {sorted(unwanted)[0]!r}, which ends with the name of a target: "
        "target both or neither"
    )


def _ends(name: str) -> Iterator[str]:
    """A name, and what follows each of its dots."""
    parts = name.split(".")
    return (".".join(parts[first:]) for first in range(len(parts)))


def target_parameters(parameters: Iterable[str], existing: Iterable[str]) -> list[str]:
    """The names with which peft finds exactly these parameters among the existing ones of a model.

    Names after the number of the layer (`mlp.experts.up_proj`) if they are unambiguous, full names otherwise.
    """
    wanted = set(parameters)
    short = {re.sub(r"^.*\.\d+\.", "", name) for name in wanted}
    reached = {name for name in existing if any(name == end or name.endswith(f".{end}") for end in short)}
    return sorted(short if reached == wanted else wanted)
