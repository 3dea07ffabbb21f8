"""A model that is open to be trained or used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.hub.names import repository_of
from loftq.models.positions import longest_input
from loftq.models.tasks import Task


@dataclass(frozen=True)
class Opened:
    """A model with its adapter, its tokenizer, its task, and the folder of its backbone."""

    model: Any
    tokenizer: Any
    task: Task
    folder: Path

    def name_backbone(self, name: str) -> None:
        """Set the name of the backbone, and its revision on the Hub, in the adapter's configuration."""
        is_here = Path(name).expanduser().is_dir()
        config = self.model.peft_config["default"]
        config.base_model_name_or_path, config.revision = (name, None) if is_here else repository_of(name)

    @property
    def longest(self) -> int:
        """The largest number of tokens that the model and its tokenizer take at once."""
        return longest_input(self.model, self.tokenizer.model_max_length)
