"""How many tokens a model takes. Oracle: the configs; for RoBERTa's kind, that its positions begin behind padding's id.

That the models fail with one token more is in training/test_training_tasks.py.
"""

from __future__ import annotations

import pytest
import torch
from picos import pico_config

from loftq.models.positions import longest_input
from loftq.models.tasks import TASKS, auto_class


@pytest.mark.parametrize(
    ("name", "task", "longest"),
    [
        ("llama", "causal-lm", 128),
        ("gpt2", "causal-lm", 128),
        ("bart", "seq2seq-lm", 128),
        ("roberta", "masked-lm", 128),  # of 130 positions, those of ids 0 and 1 (padding) are no token's
        ("t5", "seq2seq-lm", 1_000_000),  # whose positions are relative
    ],
)
def test_positions_are_counted_on_the_meta_device(name: str, task: str, longest: int) -> None:
    changes = {"max_position_embeddings": None} if name == "t5" else {}  # which other picos have
    with torch.device("meta"):
        model = auto_class(TASKS[task]).from_config(pico_config(name, **changes))
    assert longest_input(model) == longest
    assert longest_input(model, 48) == 48
    assert longest_input(model, int(1e30)) == longest
