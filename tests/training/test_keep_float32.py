"""KeepFloat32 in the trainers of trl. Oracle: the values that the parameters had before the trainer was made."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM

import loftq
from loftq.errors import OptionError

pytestmark = pytest.mark.filterwarnings("ignore")  # of trl, transformers and torch between themselves
PAIRS = [{"prompt": f"say {i}", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(24)]
COMMON = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
}
Values = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("start") / "out"
    return loftq.quantize(str(pico), output=output, rank=16, iters=2, quiet=True).folder


@pytest.fixture(scope="module")
def scorer(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("scorer") / "out"
    options = {"task": "sequence-classification", "num_labels": 1}
    return loftq.quantize(str(pico), output=output, rank=16, iters=1, quiet=True, **options).folder


def made(kind: str, model: Any, output: Path, callbacks: list[Any], **settings: Any) -> Any:
    """A trainer of trl on a model."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows = PAIRS if kind in ("DPO", "Reward") else [{"prompt": row["prompt"]} for row in PAIRS]
    if kind == "SFT":
        rows = [{"text": row["prompt"] + row["chosen"]} for row in PAIRS]
    more: dict[str, Any] = {}
    if kind == "GRPO":
        more["reward_funcs"] = lambda completions, **_: [float(len(set(text))) for text in completions]
        settings |= {"num_generations": 2, "max_completion_length": 4}
    arguments = getattr(trl, f"{kind}Config")(output_dir=str(output), **{**COMMON, **settings})
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
        callbacks=callbacks,
        **more,
    )


def trained(model: torch.nn.Module) -> Values:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def moved(before: Values, after: Values) -> float:
    """The share of the entries that training has changed, of those that the trainer began with."""
    changed = sum(int((before[name].to(value.dtype) != value).sum()) for name, value in after.items())
    return changed / sum(value.numel() for value in after.values())


@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO", "Reward"])
def test_what_trains_stays_float32(kind: str, folder: Path, scorer: Path, tmp_path: Path) -> None:
    model = loftq.load_qlora(scorer if kind == "Reward" else folder)
    before = trained(model)
    trainer = made(kind, model, tmp_path, [loftq.KeepFloat32(model)], learning_rate=1e-4)
    begun = trained(trainer.model)
    assert begun.keys() == before.keys()
    assert all(value.dtype == torch.float32 and torch.equal(value, before[name]) for name, value in begun.items())
    trainer.train()
    assert {value.dtype for value in trained(trainer.model).values()} == {torch.float32}
    if kind != "GRPO":  # its rewards may be the same for all answers: then nothing is learned
        assert moved(before, trained(trainer.model)) > 0.95
    assert {state["exp_avg"].dtype for state in trainer.optimizer.state.values()} == {torch.float32}


def test_stock_loading_is_enough(folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, folder, subfolder="loftq_init", is_trainable=True)
    before = trained(model)
    begun = trained(made("SFT", model, tmp_path, [loftq.KeepFloat32(model)]).model)
    assert all(value.dtype == torch.float32 and torch.equal(value, before[name]) for name, value in begun.items())


def test_trl_freezes_most_entries_without_it(folder: Path, tmp_path: Path) -> None:
    """DPO at a rate of 5e-6: the first loss is ln 2 both times, and what was learned after 12 steps differs."""
    shares, margins = {}, {}
    for cure in (False, True):
        model = loftq.load_qlora(folder)
        before = trained(model)
        callbacks = [loftq.KeepFloat32(model)] if cure else []
        trainer = made("DPO", model, tmp_path, callbacks, learning_rate=5e-6, max_steps=12)
        trainer.train()
        losses = [row for row in trainer.state.log_history if "loss" in row]
        assert losses[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        shares[cure] = moved(before, trained(trainer.model))
        margins[cure] = sum(row["rewards/margins"] for row in losses[-4:]) / 4
    assert shares[False] < 0.2, "trl no longer casts: remove the callback, and what docs/other-tools.md says of it"
    assert shares[True] > 0.95
    assert margins[True] > 3 * margins[False]


def test_one_that_is_added_later_restores_before_the_first_step(folder: Path, tmp_path: Path) -> None:
    model = loftq.load_qlora(folder)
    callback = loftq.KeepFloat32(model)
    trainer = made("SFT", model, tmp_path, [], learning_rate=1e-6)
    trainer.add_callback(callback)
    assert {value.dtype for value in trained(model).values()} == {torch.bfloat16}
    before = trained(model)
    trainer.train()
    assert {value.dtype for value in trained(model).values()} == {torch.float32}
    assert moved({name: value.float() for name, value in before.items()}, trained(model)) > 0.95


def _after_the_trainer(folder: Path, tmp_path: Path) -> None:
    model = loftq.load_qlora(folder)
    made("SFT", model, tmp_path, [])
    loftq.KeepFloat32(model)


def _for_another_model(folder: Path, tmp_path: Path) -> None:
    made("SFT", loftq.load_qlora(folder), tmp_path, [loftq.KeepFloat32(loftq.load_qlora(folder))])


def _used_twice(folder: Path, tmp_path: Path) -> None:
    model = loftq.load_qlora(folder)
    callback = loftq.KeepFloat32(model)
    for _ in range(2):
        made("SFT", model, tmp_path, [callback])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda folder, _: loftq.KeepFloat32(str(folder)), "expected the model itself"),
        (lambda folder, _: loftq.KeepFloat32(loftq.load_qlora(folder, is_trainable=False)), "is_trainable=True"),
        (_after_the_trainer, "trains in bfloat16: make the callback before the trainer"),
        (_for_another_model, "give both the same model"),
        (_used_twice, "make one for each trainer"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    wrong: Callable[[Path, Path], object], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        wrong(folder, tmp_path)
