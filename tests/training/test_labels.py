"""Labels against the problem type of a config. Oracle: the loss that transformers computes, and torch's own losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from datasets import ClassLabel, Dataset, Features, Value
from picos import pico_model, save_pico
from rows import write_rows
from torch.nn import functional
from transformers import AutoConfig

import loftq
from loftq.errors import OptionError
from loftq.training.collators import Collator
from loftq.training.encoding import Encoder
from loftq.training.labels import PROBLEMS, Labels, labels_of
from loftq.training.tasks.classification import check_alike, encode, scores

Run = Callable[..., Any]
NUMBERS, ONE, SEVERAL = PROBLEMS
NAMES = {"negative": 0, "neutral": 1, "positive": 2}


def encoded(values: list[Any], labels: Labels, **features: Any) -> Dataset:
    rows = Dataset.from_dict({"text": ["some text", "more"][: len(values)], "label": values}, **features)
    return encode(rows, {}, Encoder(byte_tokenizer(), "sequence-classification", 32, labels=labels))


@pytest.mark.parametrize(
    ("problem", "count", "values", "learned"),
    [
        (None, 1, [0.5, -2], [0.5, -2.0]),
        (NUMBERS, 1, ["0.5", "1"], [0.5, 1.0]),
        (NUMBERS, 3, [[0.5, 1.0, 2.0], [1.0, 0.0, 0.0]], [[0.5, 1.0, 2.0], [1.0, 0.0, 0.0]]),
        (None, 3, [0, 2], [0, 2]),
        (ONE, 3, [2, 1], [2, 1]),
        (None, 3, ["2", "1.0"], [2, 1]),
        (None, 3, ["positive", "Negative"], [2, 0]),
        (None, 3, [[0, 1, 1], [0, 0, 0]], [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]),
        (SEVERAL, 3, [[True, False, False], [False, True, True]], [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]),
        (SEVERAL, 3, [["positive", "neutral"], []], [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]),
        (SEVERAL, 1, [[1], [0]], [[1.0], [0.0]]),
    ],
)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_loss_is_that_of_the_problem(
    problem: str | None, count: int, values: list[Any], learned: list[Any], family: str
) -> None:
    model = pico_model(family, "sequence-classification", num_labels=count).float().eval()
    model.config.problem_type = problem
    if count == 3:
        model.config.label2id, model.config.id2label = NAMES, {at: name for name, at in NAMES.items()}
    model.config.pad_token_id = 0
    examples = encoded(values, labels_of(model.config))
    assert examples["labels"][:] == learned
    batch = Collator(0)(list(examples))
    with torch.no_grad():
        output = model(**batch)
    wanted = torch.tensor(learned)
    kind = problem or model.config.problem_type  # transformers decides by the labels, and writes what it decided
    if kind == NUMBERS:
        loss = functional.mse_loss(output.logits.reshape(wanted.shape), wanted)
    elif kind == ONE:
        loss = functional.cross_entropy(output.logits, wanted)
    else:
        loss = functional.binary_cross_entropy_with_logits(output.logits, wanted)
    assert output.logits.shape == (2, count)
    torch.testing.assert_close(output.loss, loss)


@pytest.mark.parametrize(
    ("problem", "count", "ids", "value", "match"),
    [
        (None, 2, {}, 2, "holds 2, but a whole number from 0 to 1 was expected; .* the right --num-labels"),
        (None, 2, {}, -1, "holds -1, but a whole number from 0 to 1"),
        (None, 2, {}, "good", "holds 'good', but a whole number from 0 to 1 .*; the model's config has no names"),
        (None, 3, NAMES, "good", r"a whole number from 0 to 2 or a name \(negative, neutral, positive\) was expected"),
        (None, 2, {}, None, "holds None, but a whole number"),
        (None, 2, {}, True, "holds True, but a whole number"),
        (None, 2, {}, 0.5, "holds 0.5, but a whole number"),
        (None, 1, {}, "five", "holds 'five', but a number was expected"),
        (None, 1, {}, float("nan"), "holds nan, but a number was expected"),
        (None, 1, {}, [0.5], r"holds \[0.5\], but a number was expected"),
        (NUMBERS, 2, {}, 1, "holds 1, but a list of 2 numbers was expected, because the problem_type .* is regression"),
        (NUMBERS, 2, {}, [1, None], "a list of 2 numbers was expected"),
        (NUMBERS, 2, {}, [1, 2, 3], "a list of 2 numbers was expected"),
        (ONE, 2, {}, [0, 1], "a whole number from 0 to 1 was expected, because the problem_type .* is single_label"),
        (ONE, 1, {}, 0, "one label and the problem_type single_label_classification, so there is nothing to learn"),
        (SEVERAL, 3, NAMES, 2, "a list of 3 numbers that are 0 or 1, or a list of names .* because .* is multi_label"),
        (SEVERAL, 3, NAMES, ["good"], r"or a list of names \(negative, neutral, positive\), was expected"),
        (SEVERAL, 3, {}, ["good"], "a list of 3 numbers that are 0 or 1 was expected"),
        (SEVERAL, 3, {}, [0, 1], "a list of 3 numbers that are 0 or 1 was expected"),
        (SEVERAL, 3, {}, [0, 1, 2], "a list of 3 numbers that are 0 or 1 was expected"),
        (None, 3, {}, [0, 2], "a list of 3 numbers that are 0 or 1 was expected"),
        ("ranking", 3, {}, 1, "the problem_type 'ranking' in the model's config is unknown: use regression"),
    ],
)
def test_other_labels_are_refused(problem: str | None, count: int, ids: dict[str, int], value: Any, match: str) -> None:
    with pytest.raises(OptionError, match=match) as refused:
        encoded([value], Labels(count, ids, problem))
    assert "\n" not in str(refused.value)


def test_a_bad_label_is_named_by_its_row() -> None:
    with pytest.raises(OptionError, match=r"row 2: column 'label' of the data holds 5, but a whole number"):
        encoded([1, 5], Labels(2))


def test_classes_of_a_data_set_are_matched_by_their_names() -> None:
    """As in MNLI, whose models have the same names in another order."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["Positive", "negative", "neutral"])})
    assert encoded([0, 1], Labels(3, NAMES), features=features)["labels"][:] == [2, 0]
    assert encoded([0, 1], Labels(3, {"LABEL_0": 0, "LABEL_1": 1}), features=features)["labels"][:] == [0, 1]
    with pytest.raises(OptionError, match="holds -1, but"):
        encoded([-1], Labels(3, NAMES), features=features)


def test_labels_to_train_and_to_evaluate_on_are_of_the_same_kind() -> None:
    one, several = encoded([0, 1], Labels(2)), encoded([[0, 1]], Labels(2))
    check_alike(one, one)
    with pytest.raises(OptionError, match="labels of --data are single values, but those of --eval-data are lists"):
        check_alike(one, several)


def test_scores_of_several_labels() -> None:
    """Oracle: counted by hand."""
    logits = torch.tensor([[2.0, -1.0], [1.0, 3.0], [-1.0, -1.0]]).numpy()
    several = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]).numpy()
    assert scores(logits, several) == {"accuracy": pytest.approx(1 / 3), "f1": pytest.approx(2 / 3)}
    numbers = torch.stack([torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0])], 1).numpy()
    assert scores(numbers, numbers[:, ::-1], NUMBERS) == {"pearson": pytest.approx(-1)}


def test_a_config_without_names_is_fine() -> None:
    config = SimpleNamespace(num_labels=2, label2id=None)
    assert labels_of(config) == Labels(2)


@pytest.fixture(scope="module")
def regression(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that learned a number."""
    folder = tmp_path_factory.mktemp("model") / "regression"
    return save_pico("bert", "sequence-classification", folder, num_labels=1, problem_type="regression")


@pytest.mark.parametrize(
    ("labels", "values", "figures"),
    [
        (1, [0.5, 1, 2, 3], ["pearson"]),
        (None, [0.5, 1, 2, 3], ["pearson"]),
        (3, [0, 1, 2, 1], ["accuracy", "f1", "matthews"]),
        (3, [[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], ["accuracy", "f1"]),
    ],
)
def test_a_head_of_another_size_learns_another_problem(
    labels: int | None, values: list[Any], figures: list[str], regression: Path, tmp_path: Path, run: Run
) -> None:
    """The problem type of the config was that of the old head; without --num-labels the head stays."""
    rows = [{"text": "good" * (at % 3 + 1), "label": value} for at, value in enumerate(values)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    options = ["--task", "classification", "--data", data, "--quiet", "--dtype", "float32"]
    settings = ["--adapter", "lora", "--rank", 4, "--max-steps", 1, "--output", tmp_path / "out", "--eval-data", data]
    size = [] if labels is None else ["--num-labels", labels]
    trained = run("train", regression, *options, *settings, *size)
    assert trained.exit_code == 0, trained.stderr
    measured = run("evaluate", regression, "--adapter", tmp_path / "out", *options)
    assert measured.exit_code == 0, measured.stderr
    assert measured.stdout.splitlines()[0].split() == [*figures, "examples"]


def test_labels_of_another_problem_leave_no_folder(regression: Path, tmp_path: Path, run: Run) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "good", "label": ["a", "b"]}])
    settings = ["--task", "classification", "--adapter", "lora", "--rank", 4, "--output", tmp_path / "out", "--quiet"]
    refused = run("train", regression, "--data", data, *settings)
    assert refused.exit_code == 2
    assert "row 1: column 'label' of the data holds ['a', 'b'], but a number was expected" in refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("labels", "problem"), [(None, "regression"), (3, None)])
def test_an_artifact_has_the_problem_of_its_head(
    labels: int | None, problem: str | None, regression: Path, tmp_path: Path
) -> None:
    made = loftq.quantize(str(regression), output=tmp_path / "out", rank=4, iters=1, num_labels=labels, quiet=True)
    assert AutoConfig.from_pretrained(made.folder).problem_type == problem
