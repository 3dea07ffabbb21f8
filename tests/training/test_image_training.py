"""Training on conversations with images, with processors of small parts. Oracle: transformers' own processors.

Covers: loftq/hub/images.py, loftq/hub/image_messages.py, loftq/hub/columns.py, loftq/models/image_text.py,
loftq/training/collators.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_processors import IMAGES_FIRST, NEED_TORCHVISION, PARTS, TYPES, draw, processor_of
from vision_models import vision_model

from loftq.models.image_text import ImageText
from loftq.training.collators import ImageCollator
from loftq.training.data import read_rows
from loftq.training.encoding import IGNORED, Encoder
from loftq.training.tasks import TRAINING_TASKS

QUICK = ("llava", "idefics3", "gemma3")
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TYPES]
ANSWERS = ("A cat.", "Two dogs, it seems.")


def user(*parts: str) -> dict[str, Any]:
    """A message of images, by their names, and texts."""
    kinds = {True: ("image", "path"), False: ("text", "text")}
    named = [(kinds[part.endswith(".png")], part) for part in parts]
    return {"role": "user", "content": [{"type": kind, key: part} for (kind, key), part in named]}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def rows_in(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def encoder_of(name: str, folder: Path, data: Path, template: str = PARTS, **options: Any) -> tuple[Encoder, Any]:
    processor = processor_of(name, template)
    processor.save_pretrained(folder)
    tokenizer = processor_of(name, template).tokenizer
    return Encoder(tokenizer, "image-text-to-text", 512, folder=folder, data_folders=(data,), **options), processor


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("template", [PARTS, IMAGES_FIRST], ids=["parts", "images first"])
def test_only_answers_are_learned(name: str, template: str, tmp_path: Path) -> None:
    """Oracles: the processor's own encoding of the conversation, and the text of the answers."""
    if name in NEED_TORCHVISION:
        pytest.importorskip("torchvision")
    model = vision_model(name)
    model.config.save_pretrained(tmp_path / "model")
    draw(tmp_path)
    encoder, processor = encoder_of(name, tmp_path / "model", tmp_path, template)
    talks = [
        [user("0.png", "What is it?"), answer(ANSWERS[0])],
        [user("1.png", "And?"), answer(ANSWERS[1]), user("2.png", "Now?"), answer(ANSWERS[0])],
        [user("Nothing to see."), answer(ANSWERS[1])],
    ]
    rows = read_rows([rows_in(tmp_path, [{"messages": talk} for talk in talks])])
    examples = TRAINING_TASKS["sft"].encode(rows, {}, encoder)
    expected = []
    for talk, example in zip(talks, examples, strict=True):
        placed = json.loads(json.dumps(talk).replace('"path": "', f'"path": "{tmp_path}/'))
        options = {"tokenize": True, "return_dict": True, "processor_kwargs": {"add_special_tokens": False}}
        expected.append(processor.apply_chat_template(placed, return_tensors="pt", **options))
        assert example["input_ids"] == expected[-1]["input_ids"][0].tolist()
        learned = [label for label in example["labels"] if label != IGNORED]
        answers = [message["content"][0]["text"] for message in talk if message["role"] == "assistant"]
        assert encoder.tokenizer.decode(learned) == "".join(f"{text}</s>" for text in answers)

    image_text = ImageText(processor, encoder.tokenizer, (tmp_path,))
    collate = ImageCollator(image_text, torch.bfloat16)
    alone = [collate([example]) for example in examples]
    for batch, wanted in zip(alone, expected, strict=True):
        for key, tensor in wanted.items():
            assert torch.equal(batch[key], tensor.to(batch[key].dtype)), key
    together = collate(list(examples))
    with torch.no_grad():
        apart = [model(**{key: value for key, value in batch.items() if key != "labels"}).logits for batch in alone]
        logits = model(**{key: value for key, value in together.items() if key != "labels"}).logits
    for row, own in enumerate(apart):
        torch.testing.assert_close(logits[row, : own.shape[1]].float(), own[0].float(), rtol=0.05, atol=0.05)
        assert together["labels"][row].tolist()[: own.shape[1]] == examples[row]["labels"]
