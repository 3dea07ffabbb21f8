"""The errors of this package, as a tree. Every message says what is wrong and where, what was expected, and what to do.

LoftQError
├── OptionError            the value of an option cannot be used      (exit code 2)
│   └── UnknownNameError   a name is not in its table                 (exit code 2)
├── SourceError            the model to quantize cannot be read
│   └── CheckpointError    its files are damaged or contradict each other
├── OutputError            the output cannot be written: it exists already, its disk is full or read-only
├── ClusterError           the workers or nodes of a cluster failed; what was done before remains
├── HubError               the Hub refuses an upload, or cannot be reached
└── ArtifactError          a loftq folder is incomplete, damaged or does not match
"""

from __future__ import annotations

from collections.abc import Iterable

from loftq.secrets import redacted


class LoftQError(Exception):
    """Base class of all errors that this package raises on purpose. Passwords and tokens in a message are hidden."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(redacted(str(message)))


class OptionError(LoftQError):
    """An option has a value that it cannot take. The message says which values are valid."""

    exit_code = 2


class UnknownNameError(OptionError):
    """A name is not in its table. The message lists the valid names and suggests the nearest one."""

    def __init__(self, kind: str, name: str, valid: Iterable[str]) -> None:
        import difflib  # imported here, because it would slow down every start of the command line

        names = sorted(valid)
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        super().__init__(f"unknown {kind} {name!r}{hint} (known: {', '.join(names)})")


class SourceError(LoftQError):
    """The model to quantize cannot be found, reached or used."""


class CheckpointError(SourceError):
    """The files of a checkpoint are damaged, incomplete or contradict each other."""


class OutputError(LoftQError):
    """The output cannot be written."""


class ClusterError(LoftQError):
    """The workers or the nodes of a cluster failed. A run can be resumed."""


class HubError(LoftQError):
    """The Hub refuses an upload, or cannot be reached."""


class ArtifactError(LoftQError):
    """A loftq folder is incomplete or damaged, or does not match what it is used with."""
