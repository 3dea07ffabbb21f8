"""The zoo's figure of a training step beside the dry run's, which test_training_memory.py compares with real runs.

Both are of one sequence of 1,024 tokens, in bfloat16, with gradient checkpointing and Adam.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from grids import thinned
from peft import get_peft_model

from loftq.display import size
from loftq.models.training_memory import kept_bytes, trained_bytes
from loftq.planning.footprint import TOKENS, footprint
from loftq.training.memory import on_meta
from loftq.training.open_model import lora_config
from loftq.training.settings import TrainSettings
from loftq.verbs import zoo
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


def test_the_zoo_names_the_step_that_it_counts(run: Callable[..., Any]) -> None:
    """Oracle: the dry run's count with the options that `zoo show` prints, on a GPU."""
    shown = run("zoo", "show", "qwen3-0.6b").stdout
    line = next(line for line in shown.splitlines() if line.startswith("to train"))
    words = line.partition("with ")[2].split()
    entry, source = find_recipe("qwen3-0.6b"), zoo._source("Qwen/Qwen3-0.6B")
    options = {"batch_size": int(words[1]), "cutoff_len": int(words[3]), "optim": words[6]}
    assert words[4] == "--gradient-checkpointing"
    settings = TrainSettings(model="m", data=("d",), output="o", rank=entry.recipe.rank, **options)
    planned, gpu = on_meta(settings, source, torch.bfloat16), torch.device("cuda")
    counted = planned.weights + planned.adapter_bytes(settings, gpu)
    counted += planned.activations(settings, (1, settings.cutoff_len), gpu, checkpointing=True)
    assert 0.9 < entry.footprint.train / counted < 1.25
    assert size(entry.footprint.train) in line


def test_what_is_trained_takes_its_optimizers_state() -> None:
    """Oracle: torch's Adam, whose tensors are counted; bitsandbytes' in 8 bits has a byte for each moment."""
    parameter = torch.zeros(1000, requires_grad=True)
    parameter.grad = torch.ones(1000)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    state = [value for value in optimizer.state[parameter].values() if value.numel() == 1000]
    assert trained_bytes(1000) == sum(tensor.nbytes for tensor in (parameter, parameter.grad, *state))
    assert trained_bytes(1000, "paged_adamw_8bit") == trained_bytes(1000) - 6 * 1000
