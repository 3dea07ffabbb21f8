"""What `loftq merge` writes, whatever it is made from: what the verb uses of it, and the check of its sources."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from loftq.artifacts.staging import Staging
from loftq.errors import ArtifactError
from loftq.merging.settings import MergeRun, MergeSettings


class Export(ABC):
    """One result of `loftq merge --to NAME`."""

    name: ClassVar[str]  # the value of --to
    suffix: ClassVar[str] = ".safetensors"  # of the files with the weights
    uses: ClassVar[tuple[str, ...]] = ()  # the names of the settings that it uses

    def __init__(self, settings: MergeSettings, run: MergeRun) -> None:
        self.settings = settings
        self.run = run
        self.difference: float | None = None  # that of the logits from those before the merge, once it is known

    @abstractmethod
    def check(self) -> float | None:
        """Return the part of the adapter that would be lost. Raises OptionError if the target cannot hold the model."""

    @property
    @abstractmethod
    def planned_bytes(self) -> int:
        """The bytes that the weights will take on the disk while they are written, or a little less."""

    @abstractmethod
    def write(self, staging: Staging) -> None:
        """Write all files, the manifest last. Tensors that `staging` already has are not written again."""

    @abstractmethod
    def notes(self) -> tuple[str, ...]:
        """Notes for the user. Raises ArtifactError for an adapter of another backbone."""

    @abstractmethod
    def made_from(self) -> dict[str, Any]:
        """The hashes or places of what is read, for the fingerprint."""

    @abstractmethod
    def read_files(self) -> list[Path]:
        """All files that are read."""

    @property
    @abstractmethod
    def layers(self) -> int:
        """The number of linears that an adapter was merged into."""

    def fingerprint(self) -> dict[str, Any]:
        """Everything that the bytes of the result depend on."""
        return {
            "target": self.name,
            **self.made_from(),
            "version": version("loftq"),
            "settings": {name: getattr(self.settings, name) for name in self.uses if name not in ("device",)},
            "read_files": self._states(),
        }

    def check_sources(self, fingerprint: Mapping[str, Any]) -> None:
        """Raise ArtifactError if a file that was read is not the one that it was when the fingerprint was made."""
        before = fingerprint["read_files"]
        try:
            now = self._states()
        except FileNotFoundError as error:
            raise ArtifactError(f"{error.filename} was removed during the run: restore it and run again") from error
        changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        if changed:
            raise ArtifactError(f"{changed[0]} was changed during the run: run again with --overwrite")

    def _states(self) -> dict[str, list[int]]:
        """Size and modification time (ns) of each file that is read, by its path."""
        states = {str(path): path.stat() for path in self.read_files()}
        return {path: [state.st_size, state.st_mtime_ns] for path, state in states.items()}
