"""Calibration on conversations with images. Oracles: transformers' processors, and the model in memory.

Covers: loftq/calibration/conversations.py.
"""

from __future__ import annotations

import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_processors import NEED_TORCHVISION, TYPES, draw, save_with_processor
from PIL import Image as Pictures
from transformers import AutoModelForImageTextToText, AutoProcessor

import loftq
from loftq.calibration import conversations, windows
from loftq.calibration.gather import gather
from loftq.errors import OptionError
from loftq.hub.source import find_source
from loftq.planning.planner import make_plan
from loftq.planning.recipe import recipe_of

QUICK = ("llava", "idefics3")
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TYPES]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (conversations, windows):
        monkeypatch.setattr(module, "MIN_TOKENS", 64)


def talk(*images: str, texts: tuple[str, ...] = ("What is it?", "A cat.")) -> dict[str, Any]:
    asked = [*({"type": "image", "path": image} for image in images), {"type": "text", "text": texts[0]}]
    said = [{"type": "text", "text": texts[1]}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "talks.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(folder / "talks.jsonl")


@pytest.mark.parametrize("name", CASES)
def test_moments_are_those_of_the_model_in_memory(name: str, tmp_path: Path) -> None:
    """The vision tower is a target too. A quantized model then comes nearer for images than without calibration."""
    if name in NEED_TORCHVISION:
        pytest.importorskip("torchvision")
    source = save_with_processor(name, tmp_path / "source")
    names = draw(tmp_path, 3)
    rows = [*(talk(image, texts=("What?" * at, f"It is {at}.")) for at, image in enumerate(names, 1)), talk(*names[:2])]
    options: dict[str, Any] = {"calibration": write(tmp_path, rows), "calibration_tokens": 4096, "rank": 4}
    plan = make_plan(find_source(str(source)), recipe_of(**options, target_modules=("*",)))
    calibration = conversations.prepare_conversations(
        plan, options["calibration"], tokens=4096, sequence_length=512, seed=0
    )
    assert calibration is not None
    found = gather(plan, calibration, tmp_path / "cache", quiet=True)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    sums: dict[str, Any] = defaultdict(list)
    for layer in plan.linears:

        def see(module: str, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = (args[0] if args else next(iter(kwargs.values()))).double()
            sums[module].append(inputs.reshape(-1, inputs.shape[-1]))

        model.get_submodule(layer.module).register_forward_pre_hook(partial(see, layer.module), with_kwargs=True)
    processor = AutoProcessor.from_pretrained(source)
    for part in (part for row in rows for part in row["messages"][0]["content"] if part["type"] == "image"):
        part["image"] = Pictures.open(tmp_path / part.pop("path")).convert("RGB")
    settings: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    plain = {"processor_kwargs": {"add_special_tokens": False}}
    inputs = [processor.apply_chat_template(row["messages"], **settings, **plain) for row in rows]
    with torch.no_grad():
        wanted = [model(**one).logits for one in inputs]
    assert calibration.tokens == sum(one["input_ids"].numel() for one in inputs)
    assert sums
    for module, parts in sums.items():
        tokens = torch.cat(parts)
        assert found.count(module) == len(tokens)
        moment = tokens.t() @ tokens / len(tokens)
        assert float((found.moment(module) - moment).norm() / moment.norm()) < 1e-4, module

    errors = []
    for at, more in enumerate(({}, options)):
        folder = loftq.quantize(str(source), output=tmp_path / str(at), **{"rank": 4, **more}, quiet=True).folder
        adapted = loftq.load_qlora(folder, is_trainable=False).eval()
        halved = [{k: v.bfloat16() if v.is_floating_point() else v for k, v in one.items()} for one in inputs]
        with torch.no_grad():
            logits = [adapted(**one).logits for one in halved]
        errors.append(float(sum((a.float() - b).norm() for a, b in zip(logits, wanted, strict=True))))
    assert errors[1] < errors[0]


def test_what_is_said_and_refused(tmp_path: Path, run: Any) -> None:
    source = save_with_processor("llava", tmp_path / "source")
    draw(tmp_path, 1)
    rows = [talk("0.png")] * 4 + [talk("0.png", texts=("What? " * 40, "A cat."))]
    options = ("--rank", "4", "--sequence-length", "64", "--calibration-tokens", "4096")
    data = write(tmp_path, rows)
    made = run("quantize", source, "--calibration", data, *options, "--output", tmp_path / "out")
    assert made.exit_code == 0, made.stderr
    assert "calibrated on conversations with images" in made.stdout
    again = run("quantize", source, "--calibration", data, *options, "--output", tmp_path / "out", "--resume")
    assert again.exit_code == 0, again.stderr
    write(tmp_path, [*rows[:3], talk("gone.png")])
    gone = run("quantize", source, "--calibration", data, *options, "--output", tmp_path / "other")
    assert gone.exit_code == 2
    assert "row 4: no such image: gone.png (looked in: " in gone.stderr
    assert not (tmp_path / "other").exists()
    write(tmp_path, rows[:1])
    few = run("quantize", source, "--calibration", data, *options, "--output", tmp_path / "other")
    assert "1 conversations with" in few.stderr
    with pytest.raises(OptionError, match="sequence-length"):
        loftq.quantize(str(source), calibration=write(tmp_path, rows[4:]), sequence_length=16, output=tmp_path / "x")


def test_a_text_stays_a_text(tmp_path: Path) -> None:
    """Rows with a text each, and the text that is shipped, are no conversations."""
    plan = make_plan(find_source(str(save_with_processor("llava", tmp_path / "m"))), recipe_of(rank=4))
    (tmp_path / "t.jsonl").write_text('{"text": "a", "images": ["0.png"]}')
    for text in ("default", str(tmp_path / "t.jsonl")):
        assert conversations.prepare_conversations(plan, text, tokens=4096, sequence_length=64, seed=0) is None
