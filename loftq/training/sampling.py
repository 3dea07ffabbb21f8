"""The settings with which a model writes: the length of an answer, and how its tokens are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loftq.settings import check, setting


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings of an answer. Raises OptionError for a value that no answer can have."""

    max_new_tokens: int = setting(256, "Largest number of tokens to write.", "run", least=1)
    temperature: float = setting(0.0, "Temperature of sampling; 0 takes the likeliest.", "run", least=0, most=100)
    top_p: float = setting(1.0, "Part of the probability that sampling draws from.", "run", above=0, most=1)
    top_k: int | None = setting(
        None, "Number of the likeliest tokens that sampling draws from.", "run", least=1, usual="50"
    )
    repetition_penalty: float = setting(
        1.0, "Divisor of the odds of tokens that are there already; 1 for none.", "run", above=0, most=100
    )
    seed: int = setting(0, "Seed of the sampling.", "run", least=0, most=2**32 - 1)

    def __post_init__(self) -> None:
        check(self)

    def arguments(self) -> dict[str, Any]:
        """The arguments of transformers' `generate` that say how tokens are chosen."""
        penalty = {"repetition_penalty": self.repetition_penalty} if self.repetition_penalty != 1 else {}
        if not self.temperature:
            return penalty
        chosen = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return {**chosen, "top_k": 50 if self.top_k is None else self.top_k, **penalty}
