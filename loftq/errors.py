"""What can go wrong, as a tree. Every message says what, where, what was expected, and the next step.

LoftQError
├── OptionError            an option's value cannot be used           (exit code 2)
│   └── UnknownNameError   a name that is in no table                 (exit code 2)
├── SourceError            the model to quantize cannot be read
│   └── CheckpointError    its files are damaged or contradict each other
├── OutputError            the folder to write is in the way, full or read-only
├── HubError               the Hub refuses what is pushed, or cannot be reached
└── ArtifactError          a folder of ours that is incomplete or does not fit
"""

from __future__ import annotations

from collections.abc import Iterable


class LoftQError(Exception):
    """Base class of everything this package raises on purpose."""

    exit_code = 1


class OptionError(LoftQError):
    """A value that an option cannot take. Says which ones it can."""

    exit_code = 2


class UnknownNameError(OptionError):
    """A name that is not in its table. Lists the names that are, the nearest first."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        import difflib  # here, since every start of the command line would wait for it

        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        super().__init__(f"unknown {kind} {name!r}{hint} (known: {', '.join(names)})")


class SourceError(LoftQError):
    """The model to quantize cannot be found, reached or used."""


class CheckpointError(SourceError):
    """A checkpoint's files are damaged, incomplete or contradict each other."""


class OutputError(LoftQError):
    """The output folder cannot be written as asked."""


class HubError(LoftQError):
    """The Hub refuses what is pushed to it, or cannot be reached."""


class ArtifactError(LoftQError):
    """A loftq folder is incomplete, damaged, or does not belong to what it is used with."""
