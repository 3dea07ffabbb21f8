"""Training on conversations with images, with processors of small parts. Oracle: transformers' own processors.

Covers: loftq/hub/images.py, loftq/hub/image_messages.py, loftq/hub/columns.py, loftq/models/image_text.py,
loftq/training/collators.py.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Image
from pico_processors import IMAGES_FIRST, NEED_TORCHVISION, PARTS, TYPES, draw, processor_of, save_with_processor
from PIL import Image as Pictures
from transformers import AutoModelForImageTextToText, AutoProcessor
from vision_models import save_vision, vision_model

import loftq
from loftq.errors import OptionError
from loftq.models.image_text import ImageText, read_processor
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
        if name == "mllama" and row != 1:
            continue  # in a batch, its layers also attend to the images that pad a row
        torch.testing.assert_close(logits[row, : own.shape[1]].float(), own[0].float(), rtol=0.05, atol=0.05)
        assert together["labels"][row].tolist()[: own.shape[1]] == examples[row]["labels"]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llava with its processor, quantized. Do not write to it."""
    folder = tmp_path_factory.mktemp("quantized")
    source = save_with_processor("llava", folder / "llava")
    return loftq.quantize(str(source), output=folder / "out", rank=4, iters=1, quiet=True).folder


def test_images_are_learned_and_the_processor_stays_with_the_model(quantized: Path, tmp_path: Path, run: Any) -> None:
    """Oracle: the answers of the merged folder in stock transformers, which depend on the image alone."""
    names = draw(tmp_path / "pictures", 2)
    texts = dict(zip(names, "ab", strict=True))
    talks = [{"image": f"pictures/{name}", "prompt": "<image>?", "response": text} for name, text in texts.items()]
    data = rows_in(tmp_path, talks * 8)
    options: dict[str, Any] = {"epochs": 12, "learning_rate": 2e-2, "batch_size": 4, "eval_data": (data,)}
    loftq.train(quantized, data=(data,), output=tmp_path / "trained", quiet=True, **options)
    shown = run("train", quantized, "--data", data, "--output", tmp_path / "none", "--dry-run")
    assert shown.exit_code == 0, shown.stderr
    assert re.search("⟦[ab]</s>⟧", shown.stdout)
    merged = tmp_path / "merged"
    loftq.merge(tmp_path / "trained", to="bf16", output=merged, quiet=True)
    processor = AutoProcessor.from_pretrained(merged)
    model = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.bfloat16).eval()
    settings = [(folder / "processor_config.json").read_bytes() for folder in (quantized, tmp_path / "trained", merged)]
    assert settings[0] == settings[1] == settings[2]
    for name, text in texts.items():
        image = Pictures.open(tmp_path / "pictures" / name).convert("RGB")
        inputs = processor(text=["<user><image>?</s><assistant>"], images=[image], return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        with torch.no_grad():
            assert processor.tokenizer.decode(model(**inputs).logits[0, -1].argmax()) == text


def test_a_column_of_images_needs_no_files(tmp_path: Path) -> None:
    """Oracle: the same images in files."""
    names = draw(tmp_path, 2)
    rows = [{"prompt": "What?", "response": "It.", "images": [name]} for name in names]
    inside = Dataset.from_list([{**row, "images": [str(tmp_path / row["images"][0])]} for row in rows])
    inside.cast_column("images", [Image()]).to_parquet(tmp_path / "rows.parquet")
    found = []
    for data in (rows_in(tmp_path, rows), str(tmp_path / "rows.parquet")):
        encoder, processor = encoder_of("llava", tmp_path / "processor", tmp_path)
        examples = TRAINING_TASKS["sft"].encode(read_rows([data]), {}, encoder)
        found.append(ImageCollator(ImageText(processor, encoder.tokenizer, (tmp_path,)), torch.float32)(list(examples)))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][key]) for key, tensor in found[0].items())


ASKED = {"role": "user", "content": "<image>?"}
SAID = {"role": "assistant", "content": "It."}
TALK = [ASKED, SAID]
ODD = [ASKED, {"role": "assistant", "content": "<image>"}]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"messages": TALK, "images": ["gone.png"]},
            r"row 1: no such image: gone.png \(looked in: .*relative",
        ),
        ({"messages": TALK, "images": ["text.png"]}, "row 1: the image text.png cannot be read"),
        (
            {"messages": TALK, "images": [7]},
            r"row 1: column 'images' of the data holds \[7\], but images were",
        ),
        ({"messages": TALK, "images": ["0.png", "0.png"]}, "row 1: the row has 2 images .* 1 places"),
        (
            {"messages": ODD, "images": ["0.png", "0.png"]},
            "an answer holds an image",
        ),
        ({"messages": TALK, "images": ["0.png"], "audio": ["0.wav"]}, "column 'audio' holds something else"),
    ],
)
def test_images_that_cannot_be_used_are_named(row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    draw(tmp_path, 1)
    (tmp_path / "text.png").write_text("no image")
    encoder, _ = encoder_of("llava", tmp_path / "model", tmp_path)
    with pytest.raises(OptionError, match=problem):
        TRAINING_TASKS["sft"].encode(read_rows([rows_in(tmp_path, [row])]), {}, encoder)


def test_images_beyond_the_limit_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: the number of tokens. A text that is cut after its images still teaches the beginning of its answer."""
    draw(tmp_path, 1)
    prompts = ("?", "What? " * 20 + "<image>")
    rows = [{"prompt": prompt, "response": "It is a cat." * 9, "image": "0.png"} for prompt in prompts]
    encoder, _ = encoder_of("llava", tmp_path / "model", tmp_path)
    examples = TRAINING_TASKS["sft"].encode(read_rows([rows_in(tmp_path, rows)]), {}, replace(encoder, cutoff_len=64))
    assert len(examples) == 1
    assert len(examples[0]["input_ids"]) == 64
    assert "1 of 2 examples are left out" in caplog.text


def test_models_and_folders_that_take_no_images(quantized: Path, pico: Path, tmp_path: Path, run: Any) -> None:
    draw(tmp_path, 1)
    data = rows_in(tmp_path, [{"messages": TALK, "images": ["0.png"]}] * 4)
    text_model = run("train", pico, "--data", data, "--output", tmp_path / "t", "--adapter", "lora", "--rank", "4")
    assert text_model.exit_code == 2
    assert "row 1: it holds images, and a causal-lm model reads text alone" in text_model.stderr
    bare = save_vision("llava", tmp_path / "bare")
    no_processor = run("train", bare, "--data", data, "--output", tmp_path / "t", "--adapter", "lora", "--rank", "4")
    assert no_processor.exit_code != 0
    assert "has no processor of images (preprocessor_config.json or processor_config.json)" in no_processor.stderr
    plain = run("train", quantized, "--data", data, "--output", tmp_path / "t", "--no-chat-template")
    assert plain.exit_code == 2
    assert "only a chat template can write" in plain.stderr
    assert not (tmp_path / "t").exists()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vision_model("qwen2_5_vl").config.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessor"}')
    monkeypatch.setattr("loftq.models.image_text._is_installed", lambda name: name != "torchvision")
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", _refuse)
    with pytest.raises(OptionError, match=r"needs torchvision: pip install 'loftq\[vision\]'"):
        read_processor(tmp_path)


def _refuse(*_: Any, **__: Any) -> None:
    raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library")


def test_generate_looks_at_images(quantized: Path, pico: Path, tmp_path: Path, run: Any) -> None:
    """Oracle: greedy generation of stock transformers with the same adapter."""
    (name,) = draw(tmp_path, 1)
    image = str(tmp_path / name)
    answered = run("generate", quantized, "--image", image, "--prompt", "?", "--max-new-tokens", "5", "--json", "--cpu")
    assert answered.exit_code == 0, answered.stderr
    model = loftq.load_qlora(quantized, is_trainable=False).eval()
    processor = AutoProcessor.from_pretrained(quantized)
    opened = Pictures.open(image).convert("RGB")
    inputs = processor(text=["<user><image>?</s><assistant>"], images=[opened], return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    written = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(written, skip_special_tokens=True)
    assert json.loads(answered.stdout)["answer"] == expected
    blind = run("generate", pico, "--image", image, "--prompt", "?")
    assert blind.exit_code == 2
    assert "the model reads text alone" in blind.stderr
    gone = run("generate", quantized, "--image", tmp_path / "gone.png", "--prompt", "?", "--cpu")
    assert gone.exit_code == 2
    assert "no such image" in gone.stderr


def test_commands_for_text_take_these_folders(quantized: Path, tmp_path: Path, run: Any) -> None:
    """Oracle: the exit codes, and the perplexity of stock transformers' loss is finite."""
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 8)
    measured = run("evaluate", quantized, "--task", "perplexity", "--data", tmp_path / "t.txt", "--cpu", "--json")
    assert measured.exit_code == 0, measured.stderr
    said = run("generate", quantized, "--prompt", "?", "--max-new-tokens", "3", "--cpu")
    assert said.exit_code == 0, said.stderr
    assert run("verify", quantized).exit_code == 0
    assert run("inspect", quantized).exit_code == 0
    card = (quantized / "README.md").read_text()
    assert "AutoModelForImageTextToText" in card


def test_a_plain_lora_is_used_on_its_model(tmp_path: Path, run: Any) -> None:
    """The adapter names its task as that of a causal model; the checkpoint tells that it reads images."""
    source = save_with_processor("llava", tmp_path / "llava")
    (image,) = draw(tmp_path, 1)
    data = rows_in(tmp_path, [{"messages": TALK, "images": [image]}] * 4)
    options: dict[str, Any] = {"adapter": "lora", "rank": 4, "max_steps": 1, "quiet": True}
    loftq.train(source, data=(data,), output=tmp_path / "trained", **options)
    asked = run(
        "generate", tmp_path / "trained", "--image", tmp_path / image, "--prompt", "?", "--max-new-tokens", "2", "--cpu"
    )
    assert asked.exit_code == 0, asked.stderr
