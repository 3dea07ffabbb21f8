"""What a training will need, over the families. Oracle: the shapes of what a backward pass cannot do without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from grids import thinned
from picos import CHANGES, dtype_of, save_pico
from rows import write_rows

from loftq.errors import OptionError
from loftq.training import pace
from loftq.training.estimate import Estimate, estimate

_SEQ2SEQ = {"bart", "mbart", "pegasus", "marian", "t5", "t5/gated", "mt5"}
_ENCODERS = {"bert", "roberta", "xlm-roberta", "electra", "deberta", "deberta-v2", "deberta-v2/unshared"}
_ENCODERS |= {"distilbert", "albert", "camembert"}
_CAUSAL = set(CHANGES) - _SEQ2SEQ - _ENCODERS - {"vit"}
_NO_CLASSIFIER = {"pegasus", "marian", "olmoe", "granite", "codegen"}  # in transformers
_TASKS = {
    "sft": sorted(_CAUSAL),
    "summarization": sorted(_SEQ2SEQ),
    "classification": sorted({*CHANGES} - {"vit"} - _NO_CLASSIFIER),
}
_EACH_KIND = {"llama", "gpt2", "mixtral", "bert", "deberta", "albert", "bart", "t5"}
_WIDTH, _TOKENS = 64, 32
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


@pytest.fixture(autouse=True)
def _no_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_SECONDS", 0.0)


def _save(name: str, folder: Path, **changes: Any) -> Path:
    kind = "seq2seq-lm" if name in _SEQ2SEQ else "masked-lm" if name in _ENCODERS else "causal-lm"
    return save_pico(name, kind, folder / "model", **changes)


_LONG = "It rained all day and all night. " * 3
_ROWS: dict[str, dict[str, Any]] = {
    "sft": {"prompt": "Rain?", "response": _LONG},
    "summarization": {"document": _LONG, "summary": _LONG},
    "classification": {"text": _LONG, "label": 1},
}


def _estimate(folder: Path, task: str, **options: Any) -> Estimate:
    data = write_rows(folder.parent / f"{task}.jsonl", [_ROWS[task]] * 9)
    fixed = {"rank": 4, "data": str(data), "output": "unwritten", "cutoff_len": _TOKENS, "dtype": "bfloat16"}
    return estimate(str(folder), task=task, **{**fixed, **options})


@pytest.mark.parametrize(
    ("task", "name"),
    thinned(
        ((task, name) for task, names in _TASKS.items() for name in names),
        lambda _, name: name in _EACH_KIND,
    ),
)
def test_every_family_is_measured(task: str, name: str, tmp_path: Path) -> None:
    folder = _save(name, tmp_path)
    one, four, thrifty = (
        _estimate(folder, task, batch_size=rows, gradient_checkpointing=thrift, dtype=str(dtype_of(name))[6:])
        for rows, thrift in ((1, False), (4, False), (4, True))
    )
    layers = 4 if name in _SEQ2SEQ else 2
    assert thrifty.activations >= layers * 4 * _TOKENS * _WIDTH * 2  # what enters each block, in bfloat16
    assert four.activations > one.activations
    if name != "albert":  # whose two layers are one block
        assert thrifty.activations < four.activations
    assert thrifty.weights == one.weights > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_a_classifier_needs_no_padding_token(name: str, tmp_path: Path) -> None:
    without = _estimate(_save(name, tmp_path / "a", pad_token_id=None), "classification")
    assert without.memory == _estimate(_save(name, tmp_path / "b", pad_token_id=0), "classification").memory


def test_a_model_that_does_not_run_says_what_to_try(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"DebertaFor.* does not run in torch\.bfloat16 .* try another --dtype"):
        _estimate(_save("deberta", tmp_path), "classification")
