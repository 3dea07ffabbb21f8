"""What is refused before anything is trained or measured, and how an interruption ends. Oracle: the message.

Covers: loftq/training/model.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import byte_tokenizer
from rows import sums, write_rows
from safetensors.torch import load_file, save_file
from small_models import save_small

import loftq
from loftq.errors import CheckpointError, OptionError, OutputError, SourceError
from loftq_cli import main as program

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def foreign(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ checkpoint as other programs leave it."""
    folder = tmp_path_factory.mktemp("foreign") / "out"
    options: dict[str, Any] = {"adapter": "qalora", "format": "gptq", "quant_type": "int", "group_size": 32, "rank": 2}
    loftq.quantize(str(pico), output=folder, bits=4, quiet=True, **options)
    (folder / "loftq.json").unlink()
    shutil.rmtree(folder / "loftq_init")
    return folder


@pytest.mark.parametrize(
    "option",
    [{"bits": 2}, {"method": "qera"}, {"rslora": True}],
    ids=lambda option: next(iter(option)),
)
def test_a_foreign_checkpoint_leaves_no_choice(option: dict[str, Any], foreign: Path, tmp_path: Path) -> None:
    data = str(write_rows(tmp_path / "data.jsonl", sums(4)))
    name = "--" + next(iter(option)).replace("_", "-")
    with pytest.raises(OptionError, match=f"{name}: .* is quantized already, and not by loftq"):
        loftq.train(str(foreign), data=data, output=tmp_path / "out", quiet=True, **option)


def test_weights_of_8_bits_are_named(pico: Path, tmp_path: Path) -> None:
    """Without their scales they would be read as other values."""
    folder = Path(shutil.copytree(pico, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors", {"format": "pt"})
    data = str(write_rows(tmp_path / "data.jsonl", sums(4)))
    for use in (
        lambda: loftq.generate(str(folder), "hi", cpu=True),
        lambda: loftq.train(str(folder), adapter="lora", rank=4, data=data, output=tmp_path / "out", quiet=True),
        lambda: loftq.evaluate(str(folder), data=data, columns={"text": "prompt"}, cpu=True, quiet=True),
    ):
        with pytest.raises(CheckpointError, match=f"tensor {name!r} has dtype torch.float8_e4m3fn: expected 16 or 32"):
            use()


def test_tokens_without_embeddings_are_named(pico: Path, tmp_path: Path) -> None:
    """Of a tokenizer to which tokens were added: in training, generating and evaluating of each kind."""
    folder = Path(shutil.copytree(pico, tmp_path / "model"))
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<x{i}>" for i in range(80)])  # the embeddings have rows for 62 of them
    tokenizer.save_pretrained(folder)
    rows = [{"prompt": "a", "response": "<x79>", "text": "b <x79> c", "label": 0, "document": "<x79>", "summary": "s"}]
    data = str(write_rows(tmp_path / "data.jsonl", rows * 4))
    new: dict[str, Any] = {"adapter": "lora", "rank": 4, "output": tmp_path / "out", "max_steps": 1}
    for use in (
        lambda: loftq.generate(str(folder), "<x79>", max_new_tokens=2, cpu=True),
        lambda: loftq.generate(str(folder), "<x79>", max_new_tokens=2, cpu=True, chat_template=False),
        *(
            lambda task=task: loftq.train(str(folder), data=data, task=task, quiet=True, cpu=True, **new)
            for task in ("sft", "clm", "classification", "summarization")
        ),
        *(
            lambda task=task: loftq.evaluate(str(folder), data=data, task=task, quiet=True, cpu=True)
            for task in ("perplexity", "summarization")
        ),
    ):
        with pytest.raises(
            SourceError, match="produces the token 337, but the last row of the model's embeddings is 319"
        ):
            use()


@pytest.mark.parametrize("text", ["[1]", '{"settings": 5}', "{}", "{"])
def test_a_record_that_is_damaged(text: str, pico: Path, tmp_path: Path) -> None:
    data = str(write_rows(tmp_path / "data.jsonl", sums(4)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "training.json").write_text(text, encoding="utf-8")
    with pytest.raises(OutputError, match=r"training\.json is damaged"):
        loftq.train(str(pico), data=data, output=tmp_path / "out", resume=True, quiet=True)


def test_a_task_of_the_harness_without_its_data(
    pico: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    # lm-eval's own tasks take half of a minute to read
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    task = {
        "task": "pico_nothing",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "nothing.json")}},
        "test_split": "test",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{gold}}",
    }
    (tmp_path / "pico_nothing.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    result = run("evaluate", pico, "--harness", "pico_nothing", "--include", tmp_path)
    assert result.exit_code == 2
    assert "--harness pico_nothing: the data cannot be read" in result.stderr


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train", "interrupted: finished work is kept, add --resume to continue"),
        ("push", "interrupted: finished work is kept, run the same command again to continue"),
        ("generate", "interrupted"),
        ("evaluate", "interrupted"),
    ],
)
def test_only_what_goes_on_says_so(
    command: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program._Commands, "invoke", interrupt)
    with pytest.raises(SystemExit) as ended:
        program.main([command])
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip() == said


@pytest.mark.parametrize(("kind", "task"), [("whisper", "speech-seq2seq"), ("hubert", "ctc")])
def test_models_of_speech_are_refused_in_one_line(kind: str, task: str, tmp_path: Path, run: Run) -> None:
    source = save_small(kind, task, tmp_path / "source")
    folder = loftq.quantize(str(source), output=tmp_path / "out", rank=8, iters=1, quiet=True).folder
    data = write_rows(tmp_path / "data.jsonl", sums(4))
    for words in (
        ("train", source, "--data", data, "--output", tmp_path / "trained"),
        ("train", folder, "--data", data, "--output", tmp_path / "trained"),
        ("evaluate", folder, "--data", data),
        ("generate", folder, "--prompt", "hi"),
    ):
        ended = run(*words)
        assert ended.exit_code == 2, words
        last = ended.stderr.strip().splitlines()[-1]  # after the progress of reading the rows
        assert last.startswith("Error: ")
        assert f"is a {task} model" in last
    assert not (tmp_path / "trained").exists()
