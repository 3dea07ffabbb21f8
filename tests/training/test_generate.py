"""Generating. Oracle: transformers' own greedy generation.

Covers: cli/generate.py, loftq/training/opened.py.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from picos import save_pico
from transformers import AutoTokenizer

import loftq

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def artifact(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "out"
    return loftq.quantize(str(pico), output=folder, rank=4, iters=1, quiet=True).folder


def greedy(folder: Path, text: str, count: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = loftq.load_qlora(folder, is_trainable=False, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    written = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False, pad_token_id=257)
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))


def test_it_says_what_transformers_says_and_streams_it(artifact: Path, run: Run) -> None:
    options = ["--max-new-tokens", 8, "--dtype", "float32"]
    result = run("generate", artifact, "--prompt", "hello", "--no-chat-template", *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == greedy(artifact, "hello", 8) + "\n"
    templated = run("generate", artifact, "--prompt", "hello", "--system", "be brief", *options)
    assert templated.stdout == greedy(artifact, "system: be brief\nuser: hello\n", 8) + "\n"


def test_the_prompt_may_stand_on_the_input(artifact: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    options = ["--no-chat-template", "--max-new-tokens", 4, "--dtype", "float32"]
    assert run("generate", artifact, "--prompt", "-", *options).stdout == greedy(artifact, "hello", 4) + "\n"


def test_a_seed_decides_a_sample(artifact: Path) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "max_new_tokens": 12, "dtype": "float32"}
    first, again, other = (loftq.generate(str(artifact), "x", seed=seed, **options) for seed in (1, 1, 2))
    assert first == again != other


def test_choices_of_tokens_are_those_of_transformers(artifact: Path, run: Run) -> None:
    """Oracle: of the single likeliest token, sampling has no choice; a penalty changes what is likeliest."""
    options: dict[str, Any] = {"max_new_tokens": 12, "dtype": "float32", "chat_template": False}
    likeliest = greedy(artifact, "hello", 12)
    assert loftq.generate(str(artifact), "hello", temperature=1.5, top_k=1, **options) == likeliest
    assert loftq.generate(str(artifact), "hello", repetition_penalty=5.0, **options) != likeliest
    words = ("--prompt", "hello", "--no-chat-template", "--max-new-tokens", 12, "--dtype", "float32", "--json")
    printed = json.loads(run("generate", artifact, *words).stdout)
    assert (printed["prompt"], printed["answer"]) == ("hello", likeliest)
    assert printed["options"] == {"chat_template": False, "max_new_tokens": 12, "dtype": "float32"}


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature -1.0"),
        (["--prompt", "x", "--temperature", "nan"], "--temperature nan"),
        (["--prompt", "x", "--top-p", "2"], "--top-p 2.0"),
        (["--prompt", "x", "--top-k", "0"], "--top-k 0: expected 1 or more"),
        (["--prompt", "x", "--repetition-penalty", "0"], "--repetition-penalty 0.0"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens 0"),
    ],
)
def test_what_is_no_request(words: list[str], problem: str, artifact: Path, run: Run) -> None:
    result = run("generate", artifact, *words)
    assert result.exit_code == 2
    assert problem in result.stderr


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_an_answer_ends_where_the_model_does(name: str, tmp_path: Path, run: Run) -> None:
    """Of learned positions there are 128. Oracle: how many tokens transformers writes that are not the end."""
    folder = save_pico(name, "seq2seq-lm" if name == "bart" else "causal-lm", tmp_path / name)
    options = ["--dtype", "float32", "--max-new-tokens", 500]
    for prompt in ("x", "x" * 200):
        plain = run("generate", folder, "--prompt", prompt, "--no-chat-template", *options)
        assert plain.exit_code == 0, plain.stderr
    if name == "gpt2":
        templated = run("generate", folder, "--prompt", "x" * 200, *options)
        assert templated.exit_code == 2
        assert "lower --max-new-tokens" in templated.stderr


def test_an_encoder_writes_no_text(tmp_path: Path, run: Run) -> None:
    folder = save_pico("bert", "masked-lm", tmp_path / "bert")
    result = run("generate", folder, "--prompt", "x")
    assert "is a masked-lm model, which cannot write text" in result.stderr
