"""What a dry run says of memory, over the families. Oracle: the shapes of what a run cannot do without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from grids import thinned
from picos import CHANGES, save_pico

import loftq
from loftq.errors import OptionError, SourceError

_SEQ2SEQ = {"bart", "mbart", "pegasus", "marian", "t5", "t5/gated", "mt5"}
_ENCODERS = {"bert", "roberta", "xlm-roberta", "electra", "deberta", "deberta-v2", "deberta-v2/unshared"}
_ENCODERS |= {"distilbert", "albert", "camembert"}
_WIDTH, _VOCABULARY = 64, 320
# What more tokens and a higher rank add is computed from sizes that all families have: one of each kind shows it.
_EACH_KIND = ["llama", "gpt2", "mixtral", "gemma3", "bert", "deberta-v2", "bart", "t5"]


def _save(name: str, folder: Path) -> Path:
    return save_pico(
        name, "seq2seq-lm" if name in _SEQ2SEQ else "masked-lm" if name in _ENCODERS else "causal-lm", folder
    )


def _parts(folder: Path, **options: Any) -> dict[str, int]:
    asked = {"rank": 4, "calibration": "default", "calibration_tokens": 8192, "sequence_length": 64, **options}
    report = loftq.quantize(str(folder), dry_run=True, quiet=True, workers=1, **asked)
    assert report.parts is not None
    assert report.memory == max(report.parts.values())
    return dict(report.parts)


@pytest.mark.parametrize(
    "name",
    thinned(((name,) for name in sorted({*CHANGES} - {"vit"})), lambda name: name in _EACH_KIND),
)
def test_every_family_is_measured(name: str, tmp_path: Path) -> None:
    few = _parts(_save(name, tmp_path))
    assert list(few) == ["calibrating", "solving", "refining"]
    assert few["refining"] > 1024 * _VOCABULARY * 4 * 3  # a step's logits, and gradients


@pytest.mark.parametrize(
    "name", thinned(((name,) for name in _EACH_KIND), lambda name: name in ("llama", "bert", "t5"))
)
def test_more_tokens_and_a_higher_rank_need_more(name: str, tmp_path: Path) -> None:
    folder = _save(name, tmp_path)
    few, many, wide = (_parts(folder, **changes) for changes in ({}, {"calibration_tokens": 65536}, {"rank": 16}))
    more = (65536 - 8192) * 256 * 6  # tokens, and their likeliest answers
    assert many["calibrating"] - few["calibrating"] >= more
    assert many["refining"] - few["refining"] == more
    # while experts are solved, the tokens of their layer are in memory
    assert (many["solving"] > few["solving"]) == (name == "mixtral")
    assert wide["refining"] > few["refining"]


def test_what_is_not_done_needs_nothing(tmp_path: Path) -> None:
    folder = _save("llama", tmp_path)
    assert list(_parts(folder, refine=0)) == ["calibrating", "solving"]
    assert list(_parts(folder, allocation="sensitive"))[:2] == ["calibrating", "measuring"]
    assert list(_parts(folder, calibration=None, calibration_tokens=None, sequence_length=None)) == ["solving"]
    one, two = (loftq.quantize(str(folder), rank=4, dry_run=True, workers=n).memory for n in (1, 2))
    assert two == 2 * one


def test_windows_are_no_longer_than_the_model_takes(tmp_path: Path) -> None:
    """Oracle: the number of positions, asked for by itself."""
    folder = save_pico("gpt2", "causal-lm", tmp_path, max_position_embeddings=96)
    assert _parts(folder, sequence_length=2048) == _parts(folder, sequence_length=96)


def test_what_a_run_refuses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--calibration-tokens 100: expected 4096 or more"):
        _parts(_save("llama", tmp_path / "a"), calibration_tokens=100)
    vit = save_pico("vit", "image-classification", tmp_path / "b")
    with pytest.raises(SourceError, match="does not read text"):
        _parts(vit)
