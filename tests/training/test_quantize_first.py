"""A model that is quantized before it trains. Oracles: the folders that are there, and what their manifests say.

Covers: loftq/solving/finished.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import pico_llama, save_model
from rows import sums, write_rows

import loftq
from loftq.errors import OutputError
from loftq.solving import layers

ZOO = Path("model_zoo") / "loftq"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of its own, with data to train on."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "sums.jsonl", sums(8))
    return tmp_path


def train(model: Path, **changes: Any) -> Path:
    """The backbone that a training of a step took."""
    fast = {"data": "sums.jsonl", "output": "out", "max_steps": 1, "rank": 4, "quiet": True, "overwrite": True}
    loftq.train(str(model), **{**fast, **changes})
    return Path(json.loads(Path("out", "adapter_config.json").read_text())["base_model_name_or_path"])


def folders() -> set[Path]:
    return {path.parent.resolve() for path in ZOO.glob("*/loftq.json")}


def test_full_precision_is_quantized_first_and_once(pico: Path) -> None:
    first = train(pico, adapter="qalora", bits=3, rank=1)
    made = (first / "loftq.json").stat().st_mtime_ns
    assert train(pico, adapter="qalora", bits=3, rank=1) == first
    assert (first / "loftq.json").stat().st_mtime_ns == made
    assert first == (ZOO / "pico-llama-3bit-1rank-qalora").resolve()
    assert json.loads((first / "loftq.json").read_text())["recipe"]["bits"] == 3
    assert json.loads(Path("out", "adapter_config.json").read_text())["use_qalora"] is True


@pytest.mark.slow
def test_each_way_to_quantize_has_its_folder(pico: Path, here: Path) -> None:
    """TrainSettings that the name does not say, another model of the same name, what `loftq quantize` left there."""
    namesake = save_model(pico_llama(tie_word_embeddings=True), here / "other" / pico.name)
    loftq.quantize(str(pico), output=ZOO / f"{pico.name}-3bit-4rank", bits=3, rank=4, iters=1, quiet=True)
    ways: list[dict[str, Any]] = [{}, {"alpha": 8.0}, {"alpha": 16.0}, {"method": "qlora"}, {"bits": 3}]
    made = [train(pico, **way) for way in ways] + [train(namesake)]
    assert made[0] == (ZOO / f"{pico.name}-4bit-4rank").resolve()
    assert len(set(made)) == 6
    assert [train(pico, **way) for way in ways] + [train(namesake)] == made
    assert len(folders()) == 7
    recipes = [json.loads((folder / "loftq.json").read_text())["recipe"] for folder in made]
    assert [recipe["alpha"] for recipe in recipes[:3]] == [4.0, 8.0, 16.0]


def test_a_model_that_changed_is_not_trained_on_its_old_quantization(pico: Path, here: Path, run: Any) -> None:
    model = shutil.copytree(pico, here / "model")
    made = train(model)
    other = pico_llama()
    other.lm_head.weight.data *= 1.5
    save_model(other, model)
    with pytest.raises(OutputError, match=r"the weights of .* have changed since .*`loftq quantize .* --overwrite"):
        train(model)
    folder = ZOO / made.name
    refused = run("quantize", model, "--rank", 4, "--output", folder, "--resume", "--quiet")
    assert refused.exit_code == 1
    assert f"the weights of {model} have changed since" in refused.stderr
    loftq.quantize(str(model), rank=4, output=folder, overwrite=True, quiet=True)
    assert train(model) == made


def test_a_quantization_that_was_cut_off_goes_on(pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the layers that are solved, each once."""
    solved: list[str] = []
    real = layers._solve_layer

    def solve(plan: Any, layer: Any, *rest: Any) -> Any:
        if len(solved) == 5:
            raise KeyboardInterrupt
        record = real(plan, layer, *rest)
        solved.append(layer.module)
        return record

    monkeypatch.setattr(layers, "_solve_layer", solve)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        train(pico)
    assert not folders()
    monkeypatch.setattr(layers, "_solve_layer", lambda *args: [solved.append(args[1].module), real(*args)][1])
    train(pico)
    assert sorted(solved) == sorted(set(solved))
    assert len(solved) == 14
