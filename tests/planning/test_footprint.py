"""The zoo's figure of a training step beside the dry run's, which test_training_memory.py compares with real runs.

Both are of one sequence of 1,024 tokens, in bfloat16, with gradient checkpointing and Adam.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from grids import thinned
from peft import get_peft_model

from loftq.models.training_memory import kept_bytes, trained_bytes
from loftq.planning.footprint import TOKENS, footprint
from loftq.training.open_model import lora_config
from loftq.verbs.zoo import find_recipe

ESTIMATED = ["gemma-3-1b", "mistral-7b-rank64", "phi-2", "qwen3-0.6b", "bart-large-4bit-rank16"]


@pytest.mark.parametrize("name", thinned(((name,) for name in ESTIMATED), lambda name: name in ("phi-2", "qwen3-0.6b")))
def test_the_two_estimates_of_training_agree(name: str) -> None:
    """A decoder's formula is up to a tenth below the count; BART's, for two stacks of short blocks, a quarter above."""
    plan = find_recipe(name).plan
    with torch.device("meta"):
        model = copy.deepcopy(cast(Any, plan.model)).to(torch.bfloat16)
        adapted = get_peft_model(model, lora_config(plan))
    gpu = torch.device("cuda")  # only its kind counts: nothing runs there
    kept = kept_bytes(adapted, (1, TOKENS), (plan.task.name,), gpu, checkpointing=True)
    fixed = plan.backbone_bytes + trained_bytes(plan.trained_parameters)
    formula = footprint(plan).train
    assert 0.9 < formula / (fixed + kept) < 1.25
    assert 2 / 3 < (formula - fixed) / kept < 3 / 2  # activations alone


def test_what_is_trained_takes_its_optimizers_state() -> None:
    """Oracle: torch's Adam, whose tensors are counted; bitsandbytes' in 8 bits has a byte for each moment."""
    parameter = torch.zeros(1000, requires_grad=True)
    parameter.grad = torch.ones(1000)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    state = [value for value in optimizer.state[parameter].values() if value.numel() == 1000]
    assert trained_bytes(1000) == sum(tensor.nbytes for tensor in (parameter, parameter.grad, *state))
    assert trained_bytes(1000, "paged_adamw_8bit") == trained_bytes(1000) - 6 * 1000
