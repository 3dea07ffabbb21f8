"""Which model learns which task. Oracle: what transformers builds the model as.

Covers: loftq/training/tasks/classification.py, loftq/training/tasks/language_modelling.py,
loftq/training/tasks/summarization.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from datasets import Dataset
from picos import pico_model, save_pico
from rows import articles, reviews, sums, write_rows
from tokenizers.processors import TemplateProcessing

from loftq.hub.source import find_source
from loftq.training.collators import Collator
from loftq.training.encoding import Encoder, load_tokenizer
from loftq.training.model import find_model
from loftq.training.open_model import open_to_use, quantizing_of
from loftq.training.settings import TrainSettings
from loftq.training.tasks import TRAINING_TASKS

Run = Callable[..., Any]


@pytest.mark.parametrize(
    ("name", "model_task", "task", "problem"),
    [
        ("bert", "masked-lm", "sft", "is a masked-lm model: name another model"),
        (
            "bart",
            "seq2seq-lm",
            "clm",
            "is a seq2seq-lm model: choose a task that it can do (gsm8k, sft, summarization)",
        ),
    ],
)
def test_a_model_learns_what_it_was_made_for(
    name: str, model_task: str, task: str, problem: str, tmp_path: Path, run: Run
) -> None:
    folder = save_pico(name, model_task, tmp_path / name)
    data = write_rows(tmp_path / "rows.jsonl", [{**row, "text": "some text"} for row in sums(4)])
    result = run("train", folder, "--task", task, "--data", data, "--output", tmp_path / "out", "--quiet")
    assert result.exit_code == 2
    assert f"--task {task} needs a causal-lm" in result.stderr
    assert problem in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "model_task", "task", "built"),
    [
        ("bart", "feature-extraction", "summarization", "seq2seq-lm"),  # as facebook/bart-large names itself
        ("bart", "seq2seq-lm", "summarization", None),
        ("bert", "masked-lm", "classification", "sequence-classification"),
    ],
)
def test_a_model_is_built_with_the_head_of_its_task(
    name: str, model_task: str, task: str, built: str | None, tmp_path: Path
) -> None:
    folder = save_pico(name, model_task, tmp_path / name)
    data = write_rows(tmp_path / "rows.jsonl", articles(4))
    settings = TrainSettings(model=str(folder), data=(str(data),), output=str(tmp_path / "out"), task=task)
    assert quantizing_of(settings, find_source(str(folder)))["task"] == built


@pytest.mark.parametrize(("name", "longest"), [("roberta", 128), ("bert", 128), ("xlm-roberta", 128)])
def test_a_model_takes_as_many_tokens_as_it_has_positions(name: str, longest: int, tmp_path: Path) -> None:
    """Of a tokenizer that names no limit. Oracle: the model's forward, which fails with one token more."""
    folder = save_pico(name, "sequence-classification", tmp_path / name)
    opened = open_to_use(find_model(str(folder)), None, torch.device("cpu"), torch.float32)
    assert opened.longest == longest
    ids = torch.full((1, longest + 1), 7)
    with torch.no_grad():
        opened.model(input_ids=ids[:, 1:])
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            opened.model(input_ids=ids)


def typed_tokenizer() -> Any:
    """One that tells the texts of a pair apart."""
    tokenizer = byte_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # so that they are saved
    return tokenizer


def classified(model: Any, rows: list[dict[str, Any]], folder: Path) -> torch.Tensor:
    """Logits of rows in one batch, read as in training and in evaluation."""
    typed_tokenizer().save_pretrained(folder)
    tokenizer = load_tokenizer(folder, model)
    examples = TRAINING_TASKS["classification"].encode(
        Dataset.from_list(rows), {}, Encoder(tokenizer, "sequence-classification", 32)
    )
    batch = Collator(tokenizer.pad_token_id)(list(examples))
    del batch["labels"]
    with torch.no_grad():
        logits: torch.Tensor = model(**batch).logits
    return logits


def test_a_text_is_classified_alone_as_in_a_batch(tmp_path: Path) -> None:
    """Of a model whose config names another padding token than its tokenizer."""
    model = pico_model("llama", "sequence-classification", num_labels=2, pad_token_id=0).float()
    rows = [{"text": text, "label": 0} for text in ("good film", "a very long text indeed")]
    together = classified(model, rows, tmp_path)
    torch.testing.assert_close(together[:1], classified(model, rows[:1], tmp_path), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_a_model_tells_the_texts_of_a_pair_apart(name: str, tmp_path: Path) -> None:
    """Where it has types of tokens. Oracle: the model on what the tokenizer itself gives."""
    model = pico_model(name, "sequence-classification", num_labels=2).float()
    pairs = [("ab", "c"), ("d", "efgh")]
    found = classified(model, [{"sentence1": a, "sentence2": b, "label": 0} for a, b in pairs], tmp_path)
    for logits, (first, second) in zip(found, pairs, strict=True):
        read = typed_tokenizer()(first, second, return_tensors="pt")
        assert read["token_type_ids"].sum() == len(second)
        if name == "distilbert":
            del read["token_type_ids"]
        with torch.no_grad():
            torch.testing.assert_close(logits, model(**read).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_an_encoder_decoder_classifies(name: str, tmp_path: Path, run: Run) -> None:
    """Which looks for the end of a text, where its tokenizer pads with that."""
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    folder = save_pico(name, "seq2seq-lm", tmp_path / name, eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(folder)
    data = write_rows(
        tmp_path / "rows.jsonl", [{**row, "text": row["text"] * (i % 3 + 1)} for i, row in enumerate(reviews(8))]
    )
    options = ["--task", "classification", "--data", data, "--quiet", "--dtype", "float32"]
    settings = ["--adapter", "lora", "--rank", 4, "--max-steps", 1, "--eval-data", data]
    trained = run("train", folder, *options, *settings, "--output", tmp_path / "out")
    assert trained.exit_code == 0, trained.stderr
    assert "held-out accuracy" in trained.stdout
    measured = run("evaluate", folder, "--adapter", tmp_path / "out", *options, "--batch-size", 3)
    assert measured.exit_code == 0, measured.stderr
    assert measured.stdout.splitlines()[0].split() == ["accuracy", "f1", "matthews", "examples"]
