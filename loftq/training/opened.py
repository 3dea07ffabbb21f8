"""A model that is open to be trained or used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        """Set the name of the backbone in the adapter's configuration."""
        self.model.peft_config["default"].base_model_name_or_path = name

    @property
    def longest(self) -> int:
        """The largest number of tokens that the model and its tokenizer take at once."""
        return longest_input(self.model, self.tokenizer.model_max_length)
