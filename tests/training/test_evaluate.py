"""Measures. Oracles: transformers' own loss, generation one prompt at a time, figures computed by hand.

Covers: cli/evaluate.py, loftq/training/answering.py, loftq/training/harness.py,
loftq/training/tasks/perplexity.py, loftq/training/tasks/task.py.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from picos import save_pico
from rows import articles, problems, sums, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import loftq
from loftq.errors import OptionError, SourceError
from loftq.models.tasks import TASKS
from loftq.training.answering import answers
from loftq.training.opened import Opened
from loftq.training.tasks import gsm8k
from loftq.training.tasks.classification import scores
from loftq.training.tasks.perplexity import perplexity
from loftq.training.tasks.summarization import rouge

Run = Callable[..., Any]
TEXT = "The quick brown fox jumps over the lazy dog. " * 12


@pytest.fixture(scope="module")
def artifact(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "out"
    return loftq.quantize(str(pico), output=folder, bits=2, rank=4, iters=2, quiet=True).folder


@pytest.fixture(scope="module")
def trained(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    data = str(write_rows(folder / "rows.jsonl", sums(8)))
    fast: dict[str, Any] = {"max_steps": 3, "learning_rate": 3e-2, "quiet": True}
    return loftq.train(str(artifact), data=data, output=folder / "out", **fast).folder


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "text.txt")


def by_hand(model: Any, ids: list[int], window: int) -> float:
    """Windows apart: transformers' mean loss of each, weighted by its tokens."""
    total = count = 0
    for start in range(0, len(ids), window):
        piece = torch.tensor([ids[start : start + window]])
        if piece.shape[1] > 1:
            with torch.no_grad():
                total += float(model(piece, labels=piece).loss) * (piece.shape[1] - 1)
            count += piece.shape[1] - 1
    return math.exp(total / count)


def test_perplexity_is_that_of_transformers(pico: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(pico)(TEXT, add_special_tokens=False).input_ids
    found = perplexity(model, ids, 50, 50, quiet=True)
    assert found["perplexity"] == pytest.approx(by_hand(model, ids, 50), rel=1e-5)
    assert found["tokens"] == len(ids) - found["windows"]
    whole = perplexity(model, ids[:100], 100, 100, quiet=True)
    assert whole["perplexity"] == pytest.approx(by_hand(model, ids[:100], 100), rel=1e-5)


def test_a_stride_scores_every_token_once(pico: Path) -> None:
    """Oracle: each token's loss given exactly the tokens of its window before it."""
    model = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(pico)(TEXT, add_special_tokens=False).input_ids[:61]
    found = perplexity(model, ids, 20, 8, quiet=True)
    assert found["tokens"] == 60
    total, done = 0.0, 1
    for start in range(0, 61, 8):
        end = min(start + 20, 61)
        with torch.no_grad():
            log = model(torch.tensor([ids[start:end]])).logits[0].log_softmax(-1)
        total -= sum(float(log[at - 1 - start, ids[at]]) for at in range(done, end))
        done = max(done, end)
    assert found["perplexity"] == pytest.approx(math.exp(total / 60), rel=1e-5)
    assert (found["window"], found["stride"]) == (20, 8)
    with pytest.raises(OptionError, match="fewer than two tokens"):
        perplexity(model, ids[:1], 20, 8)


def test_a_loss_beyond_numbers_is_infinite() -> None:
    """A model that is sure of what never comes."""

    class Wrong:
        device = torch.device("cpu")

        def __call__(self, input_ids: torch.Tensor) -> Any:
            logits = torch.zeros(*input_ids.shape, 5)
            logits[..., 0] = 2000.0
            return SimpleNamespace(logits=logits)

    assert perplexity(Wrong(), [1, 2, 3], 3, 3, quiet=True)["perplexity"] == math.inf


def test_the_table_compares_with_what_it_was_made_from(
    artifact: Path, trained: Path, pico: Path, text: str, tmp_path: Path, run: Run
) -> None:
    result = run(
        "evaluate", artifact, "--adapter", trained, "--data", text, "--compare", "--dtype", "float32", "--json"
    )
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert (printed["model"], printed["adapter"], printed["dtype"]) == (str(artifact), str(trained), "float32")
    assert (printed["device"].split()[0], printed["versions"]["torch"]) == ("cpu", torch.__version__)
    found = {name: row["perplexity"] for name, row in printed["models"].items()}
    assert list(found) == ["full precision", "plain quantization", "start", "trained"]
    ids = AutoTokenizer.from_pretrained(pico)(TEXT, add_special_tokens=False).input_ids
    full = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).eval()
    assert found["full precision"] == pytest.approx(by_hand(full, ids, 128), rel=1e-4)
    plain = loftq.quantize(str(pico), output=tmp_path / "plain", bits=2, rank=4, method="qlora", quiet=True).folder
    for name, folder, adapter in (("plain quantization", plain, None), ("trained", artifact, trained)):
        model = loftq.load_qlora(folder, adapter, is_trainable=False, dtype=torch.float32).eval()
        assert found[name] == pytest.approx(by_hand(model, ids, 128), rel=1e-4), name
    assert len(set(found.values())) == 4
    table = run("evaluate", artifact, "--adapter", trained, "--data", text, "--window", 64).stdout.splitlines()
    assert table[0].split() == ["perplexity", "tokens", "windows", "window", "stride"]
    assert table[1].split()[-2:] == ["64", "64"]
    beyond = run("evaluate", artifact, "--data", text, "--window", 9999, "--stride", 5000).stdout.splitlines()
    assert beyond[1].split()[-2:] == ["128", "128"]  # what the model takes
    assert table[1].split()[0] == "trained"


def test_the_table_goes_into_the_card(artifact: Path, pico: Path, text: str, tmp_path: Path, run: Run) -> None:
    """Once for each task and data, in place of the last; the rest of the card stays, and verifies."""
    folder = tmp_path / "copy"
    shutil.copytree(artifact, folder)
    before = (folder / "README.md").read_text(encoding="utf-8")
    (tmp_path / "other.txt").write_text("quite another text " * 9, encoding="utf-8")
    for data in (text, tmp_path / "other.txt", text):
        assert run("evaluate", folder, "--data", data, "--compare", "--card").exit_code == 0
    after = (folder / "README.md").read_text(encoding="utf-8")
    assert after.startswith(before.rstrip())
    assert after.count("### perplexity, ") == 2
    assert after.count("| full precision | ") == 2
    assert ModelCard(after).data.library_name == ModelCard(before).data.library_name
    assert run("verify", folder).exit_code == 0
    refused = run("evaluate", pico, "--data", text, "--card")
    assert refused.exit_code == 2
    assert "is not a folder that `loftq quantize` wrote, so it has no card" in refused.stderr


def test_a_source_that_is_gone(artifact: Path, text: str, tmp_path: Path, run: Run) -> None:
    result = run("evaluate", artifact, "--data", text, "--compare", "--source", tmp_path / "gone")
    assert result.exit_code == 1
    assert "no such folder" in result.stderr
    with pytest.raises(SourceError):
        loftq.evaluate(str(tmp_path / "gone"), data=text)


def test_many_prompts_are_answered_as_one_is(pico: Path) -> None:
    """Padding on the left changes nothing. Oracle: transformers' own greedy generation of each."""
    model = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(pico)
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in ("a", "hello there", "two words", "x=1")]
    found = answers(Opened(model, tokenizer, TASKS["causal-lm"], pico), prompts, 6, batch_size=3, quiet=True)
    for ids, answer in zip(prompts, found, strict=True):
        written = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=257)
        assert answer == tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)


def test_the_final_number_is_compared(
    artifact: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With answers written for the model: two right, in other words, and two wrong."""
    asked: list[str] = []

    def said(opened: Any, prompts: Any, *_: Any, **__: Any) -> list[str]:
        asked.extend(opened.tokenizer.decode(ids) for ids in prompts)
        return ["#### 1", "the answer is 2.0", "#### 7", "none"]

    monkeypatch.setattr(gsm8k, "answers", said)
    data = write_rows(tmp_path / "a.jsonl", problems(8))
    result = run(
        "evaluate", artifact, "--task", "gsm8k", "--data", data, "--max-examples", 4, "--max-new-tokens", 16, "--json"
    )
    assert json.loads(result.stdout)["models"]["start"] == {"exact match": 0.5, "questions": 4}
    assert asked[3] == "Question: What is 3+1?\nAnswer:"


def test_an_answer_without_a_number_is_no_reference(artifact: Path, tmp_path: Path, run: Run) -> None:
    data = write_rows(tmp_path / "a.jsonl", [{"question": "What is 1+1?", "answer": "no idea"}])
    result = run("evaluate", artifact, "--task", "gsm8k", "--data", data)
    assert result.exit_code == 2
    assert "column 'answer' of the data holds 'no idea'" in result.stderr


@pytest.mark.parametrize("name", ["bart", "llama"])
def test_summaries_are_written_and_scored(name: str, tmp_path: Path, run: Run) -> None:
    folder = save_pico(name, "seq2seq-lm" if name == "bart" else "causal-lm", tmp_path / name)
    data = write_rows(tmp_path / "a.jsonl", articles(3))
    options = ["--task", "summarization", "--data", data, "--max-new-tokens", 4, "--json"]
    result = run("evaluate", folder, *options)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["models"]["model"]
    assert found["documents"] == 3
    assert 0 <= found["ROUGE-L"] <= 1


def test_rouge_by_hand() -> None:
    found = rouge(["the cat sat", "a"], ["the cat ran", "b"])
    assert found == pytest.approx({"ROUGE-1": (2 / 3) / 2, "ROUGE-2": 0.5 / 2, "ROUGE-L": (2 / 3) / 2})


def test_scores_by_hand() -> None:
    logits = torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0], [0, 1]]).numpy()
    labels = torch.tensor([0, 1, 0, 0, 0]).numpy()  # one right of class 1, two wrong; two right of class 0
    found = scores(logits, labels)
    assert found["accuracy"] == pytest.approx(0.6)
    assert found["f1"] == pytest.approx(2 * (1 / 3) * 1 / (1 / 3 + 1))
    assert found["matthews"] == pytest.approx((1 * 2 - 2 * 0) / math.sqrt(3 * 1 * 4 * 2))
    numbers = scores(torch.tensor([[1.0], [2], [4]]).numpy(), torch.tensor([1.0, 2, 3]).numpy())
    assert numbers["pearson"] == pytest.approx(0.9819805)
    assert scores(torch.tensor([[1.0]]).numpy(), torch.tensor([1.0]).numpy()) == {}


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_harness_runs_a_task(
    every: bool, pico: Path, artifact: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A multiple choice task of our own, beside all of lm-eval's or alone: to read those takes half of a minute.

    Oracle: the likelihoods of the choices by transformers.
    """
    import lm_eval.tasks

    if not every:
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    rows = [{"query": "2+2=", "choices": ["4", "5"], "gold": 0}, {"query": "a b ", "choices": ["c", "x"], "gold": 1}]
    write_rows(tmp_path / "choices.json", rows)
    task = {
        "task": "pico_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "choices.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "pico_choices.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    options = ["--harness", "pico_choices", "--include", tmp_path / "tasks", "--dtype", "float32"]
    result = run("evaluate", artifact, *options, "--json")
    assert result.exit_code == 0, result.stderr
    model = loftq.load_qlora(artifact, is_trainable=False, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(pico)
    right = 0
    for row in rows:
        ids = [tokenizer(row["query"] + choice, add_special_tokens=False).input_ids for choice in row["choices"]]  # type: ignore[operator, union-attr]
        with torch.no_grad():
            best = max(
                range(2), key=lambda i: float(model(torch.tensor([ids[i]])).logits[0, -2].log_softmax(-1)[ids[i][-1]])
            )
        right += best == row["gold"]
    assert json.loads(result.stdout)["harness"]["pico_choices"]["acc,none"] == right / 2
    assert "pico_choices" in run("evaluate", artifact, *options).stdout
    unknown = run("evaluate", artifact, "--harness", "no_such_task")
    assert unknown.exit_code == 2
    assert "lm-eval has no such task" in unknown.stderr


def test_only_the_first_windows(pico: Path, text: str, tmp_path: Path, run: Run) -> None:
    """Oracle: the text that ends where they end. The bar knows how many there are."""
    words = ("--data", text, "--window", 20, "--stride", 10, "--dtype", "float32")
    result = run("evaluate", pico, *words, "--max-windows", 3, "--json")
    (tmp_path / "begin.txt").write_text(TEXT[:40], encoding="utf-8")  # a token for each character
    begin = run("evaluate", pico, "--data", tmp_path / "begin.txt", *words[2:], "--json")
    found = json.loads(result.stdout)["models"]["model"]
    assert found == json.loads(begin.stdout)["models"]["model"]
    assert (found["windows"], found["tokens"]) == (3, 39)
    assert "3/3" in result.stderr


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "--data"),
        (["--data", "x.txt", "--task", "perplexty"], "did you mean perplexity"),
        (["--data", "none.txt"], "no such file"),
        (["--data", "TEXT", "--task", "classification"], "needs a sequence-classification model"),
        (["--data", "TEXT", "--window", "1"], "--window 1: expected 2 or more"),
        (["--data", "TEXT", "--column", "text=body"], "no such column"),
        (["--data", "TEXT", "--column", "body"], "body"),
        (["--data", "TEXT", "--column", "question=text"], "unknown column 'question' (known: text)"),
        (["--data", "TEXT", "--max-new-tokens", "4"], "--max-new-tokens: --task perplexity does not use it"),
        (["--data", "TEXT", "--task", "gsm8k", "--stride", "4"], "leave it out (--task perplexity uses it)"),
        (["--data", "TEXT", "--max-examples", "4"], "--max-examples 4: a .txt file is one row, so it does not limit"),
        (["--data", "x", "--task", "gsm8k", "--max-windows", "4"], "leave it out (--task perplexity uses it)"),
        (["--data", "TEXT", "--source", "x"], "--source x: applies only with --compare"),
        (["--data", "TEXT", "--include", "x"], "--include goes with --harness"),
        (["--harness", "x", "--data", "TEXT"], "--harness takes no --data"),
    ],
)
def test_what_cannot_be_measured(words: list[str], problem: str, artifact: Path, text: str, run: Run) -> None:
    result = run("evaluate", artifact, *[text if word == "TEXT" else word for word in words])
    assert result.exit_code == 2
    assert problem in result.stderr


def test_full_precision_is_nothing_to_compare(pico: Path, text: str, run: Run) -> None:
    result = run("evaluate", pico, "--data", text, "--compare")
    assert "there is nothing to compare it with" in result.stderr
