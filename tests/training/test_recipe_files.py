"""Recipe files. Oracle: the settings written out, and Python's own parsers."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from loftq.errors import OptionError
from loftq.training.recipe_files import laid_over, read_recipe
from loftq.training.settings import TrainSettings, settings_of
from loftq_cli.main import main

RUN = {"model": "base", "data": ["a.jsonl"], "output": "out"} | {
    "learning-rate": 2e-4,
    "epochs": 2,
    "set": {"tf32": True},
}
WRITTEN = {
    "toml": 'model = "base"\ndata = ["a.jsonl"]\noutput = "out"\nlearning-rate = 2e-4\nepochs = 2\nset.tf32 = true\n',
    "yaml": "model: base\ndata: [a.jsonl]\noutput: out\nlearning-rate: 2e-4\nepochs: 2\nset: {tf32: true}\n",
    "json": json.dumps(RUN),
}
# Keys and values as FinLoRA's finetune_configs.json has them
FINLORA = {
    "sentiment_llama_3_1_8b_8bits_r8": {
        "base_model": "meta-llama/Llama-3.1-8B-Instruct",
        "dataset_path": "../data/train/finlora_sentiment_train.jsonl",
        "lora_r": 8,
        "quant_bits": 8,
        "learning_rate": 1e-4,
        "num_epochs": 4,
        "batch_size": 8,
        "gradient_accumulation_steps": 2,
        "peft_use_dora": False,
    },
    "headline_llama_3_1_8b_4bits_r4": {"base_model": "x", "dataset_path": "y.jsonl", "lora_r": 4, "quant_bits": 4},
    "sentiment_llama_3_1_8b_8bits_r8_dora": {"base_model": "x", "dataset_path": "y.jsonl", "peft_use_dora": True},
}


@pytest.mark.parametrize("kind", sorted(WRITTEN))
def test_a_run_reads_the_same_from_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    (tmp_path / f"run.{kind}").write_text(WRITTEN[kind], encoding="utf-8")
    found = settings_of(read_recipe(tmp_path / f"run.{kind}"))
    assert found == TrainSettings(
        model="base", data=("a.jsonl",), output="out", learning_rate=2e-4, epochs=2, set={"tf32": True}
    )


def test_settings_come_back_from_what_a_run_writes(tmp_path: Path) -> None:
    asked = TrainSettings(model="m", data=("d",), output="o", task="gsm8k", columns={"question": "q"}, max_steps=7)
    (tmp_path / "again.json").write_text(json.dumps(asked.to_dict()), encoding="utf-8")
    assert settings_of(read_recipe(tmp_path / "again.json")) == asked


def test_finlora_entries_run_as_they_are(tmp_path: Path) -> None:
    folder, data = tmp_path / "lora", tmp_path / "data" / "train" / "finlora_sentiment_train.jsonl"
    folder.mkdir()
    data.parent.mkdir(parents=True)
    data.write_text("{}\n", encoding="utf-8")
    (folder / "finetune_configs.json").write_text(json.dumps(FINLORA), encoding="utf-8")
    found = settings_of(read_recipe(folder / "finetune_configs.json", "sentiment_llama_3_1_8b_8bits_r8"))
    assert found == TrainSettings(
        model="meta-llama/Llama-3.1-8B-Instruct",
        data=(str(folder / "../data/train/finlora_sentiment_train.jsonl"),),
        output="sentiment_llama_3_1_8b_8bits_r8",
        rank=8,
        alpha=16.0,  # FinLoRA's default
        bits=8,
        learning_rate=1e-4,
        epochs=4,
        batch_size=8,
        gradient_accumulation=2,
    )
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "loftq.json").write_text("{}", encoding="utf-8")  # a folder that has its own alpha
    assert "alpha" not in read_recipe(folder / "finetune_configs.json", str(ours), "sentiment_llama_3_1_8b_8bits_r8")
    own = {"lora_r": 8, "lora_alpha": 4, "base_model": "m", "dataset_path": "d"}
    (tmp_path / "own.json").write_text(json.dumps(own), encoding="utf-8")
    assert read_recipe(tmp_path / "own.json")["alpha"] == 4
    with pytest.raises(OptionError, match="peft_use_dora is true: loftq trains LoRA and has no DoRA"):
        read_recipe(folder / "finetune_configs.json", "sentiment_llama_3_1_8b_8bits_r8_dora")


def test_names_of_other_programs_mean_ours(tmp_path: Path) -> None:
    theirs = {"model_name_or_path": "m", "train_file": "d", "output_dir": "o", "lr": 1e-3, "num_train_epochs": 2}
    (tmp_path / "run.json").write_text(json.dumps(theirs | {"do_train": True}), encoding="utf-8")
    found = settings_of(read_recipe(tmp_path / "run.json"))
    assert found == TrainSettings(model="m", data=("d",), output="o", learning_rate=1e-3, epochs=2)


def test_a_run_is_named_of_several(tmp_path: Path) -> None:
    path = tmp_path / "runs.toml"
    path.write_text('data = "d"\n[one]\nmodel = "a"\n[two]\nmodel = "b"\noutput = "o"\n', encoding="utf-8")
    assert read_recipe(path, "one") == {"data": "d", "model": "a", "output": "one"}
    assert read_recipe(path, "other", "two") == {"data": "d", "model": "other", "output": "o"}
    with pytest.raises(OptionError, match="holds several runs: name one of one, two"):
        read_recipe(path)
    with pytest.raises(OptionError, match="'tow'; did you mean two"):
        read_recipe(path, "tow")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"model": "m", "data": "d", "output": "o", "learning_rte": 1}', "'learning_rte'; did you mean learning_rate"),
        ('{"base_modl": "m", "data": "d", "output": "o"}', "'base_modl'; did you mean base_model"),
        ('{"model": "m", "data": "d", "output": "o", "token": "x"}', "token: a token on a command line ends up in"),
        (
            '{"model": "m", "data": "d", "output": "o", "task": "summarization", "chat_template": true}',
            r"--chat-template: summarization has no prompts: leave it out, or use --task sft or gsm8k",
        ),
        ('{"model": "m", "output": "o"}', "no data is given"),
        ('{"model": "m", "data": 5, "output": "o"}', "data = 5: expected a text or a list of texts"),
        ('{"model": "m", "data": "d", "output": "o", "target-modules": 5}', "target_modules = 5: expected a text or"),
        ('{"model": "m", "data": "d", "output": "o", "learning_rate": 20}', "expected a number above 0 and below 10"),
        (
            '{"model": "m", "data": "d", "output": "o", "set": {"remove_unused_columns": true}}',
            "--set remove_unused_columns: cannot be changed",
        ),
        ('{"model": "m", "data": "d", "output": "o", "epochs": "three"}', "epochs = 'three': expected a number"),
        ('{"model": "m", "data": "d", "output": "o", "rank": 1.5}', "rank = 1.5: expected a whole number"),
        ('{"model": "m", "data": "d", "output": "o", "cpu": 1}', "cpu = 1: expected true or false"),
        ('{"model": "m", "data": "d", "output": "o", "set": {"lerning_rate": 1}}', "TrainingArguments name"),
        (
            '{"model": "m", "data": "d", "output": "o", "set": {"learning_rate": 1}}',
            "--set learning_rate: use the option --learning-rate instead",
        ),
        ('{"model": "m", "data": "d", "output": "o", "task": "gsm8"}', "'gsm8'; did you mean gsm8k"),
        ('{"model": "m", "data": "d", "output": "o", "columns": {"answer": "a"}}', "unknown column 'answer'"),
        ('{"model": "m", "data": "d", "output": "o", "lr_scheduler": "cosin"}', "did you mean cosine"),
        ('{"model": "m", "data": "d", "output": "o", "optim": "adam"}', "unknown optim 'adam'"),
        ('{"model": "m", "data": "d", "output": "o", "batch_size": 0}', "--batch-size 0: expected 1 or more"),
        ("{", "Expecting property name"),
        ("[]", "expected a table of names and values"),
    ],
)
def test_what_is_wrong_is_named(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises(OptionError, match=problem):
        settings_of(read_recipe(tmp_path / "run.json"))


def test_the_command_line_goes_before_a_recipe_name_by_name_in_tables() -> None:
    recipe = {"epochs": 2, "columns": {"prompt": "p", "response": "r"}, "set": {"tf32": True}}
    given = {"epochs": 1, "columns": {"prompt": "q"}}
    assert laid_over(recipe, given) == {
        "epochs": 1,
        "columns": {"prompt": "q", "response": "r"},
        "set": {"tf32": True},
    }
    assert laid_over({}, given) == given


def test_a_key_that_is_a_number_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: m\ndata: d\noutput: o\n5: x\n", encoding="utf-8")
    with pytest.raises(OptionError, match="unknown setting '5'"):
        settings_of(read_recipe(tmp_path / "run.yaml"))


def test_a_home_folder_is_found_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings_of({"model": "m", "data": "d", "output": "~/out"}).output == str(tmp_path / "out")


def test_a_file_of_another_kind_and_none_at_all(tmp_path: Path) -> None:
    (tmp_path / "run.ini").write_text("", encoding="utf-8")
    with pytest.raises(OptionError, match=r"expected a \.toml, \.yaml or \.json"):
        read_recipe(tmp_path / "run.ini")
    with pytest.raises(OptionError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "run.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(OptionError, match="while parsing"):
        read_recipe(tmp_path / "run.yaml")


def test_a_table_of_the_recipe_stays_beside_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text('model = "m"\ndata = "d"\noutput = "o"\nset.nonsense = 1\n', encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["train", "--recipe", str(tmp_path / "run.toml"), "--set", "tf32=true", "--dry-run"])
    assert "unknown TrainingArguments name 'nonsense'" in capsys.readouterr().err


DEEP = {"yaml": "a: " + "[" * 5000 + "]" * 5000, "json": "[" * 99_999, "toml": "a = " + "[" * 5000 + "]" * 5000}
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("suffix", "text", "match"),
    [
        ("yaml", LAUGHS, "aliases repeat their values until there are more than 100,000"),
        ("yaml", LAUGHS.replace("[x, x]", "{x: 1}").replace("[*", "{<<: [*").replace("]\n", "]}\n"), "aliases repeat"),
        ("yaml", "set: &a [*a]\n", "line 1: an alias stands for a value that contains it"),
        ("yaml", "set: &a {b: *a}\n", "line 1: an alias stands for a value that contains it"),
        ("yaml", DEEP["yaml"], "more than 1,000 lists and tables"),
        ("yaml", "".join(" " * i + f"a{i}:\n" for i in range(1200)), "too many tables inside each other"),
        ("json", DEEP["json"], "it is nested too deeply"),
        ("toml", DEEP["toml"], "too many tables inside each other"),
        (
            "yaml",
            "seed: !!python/object/apply:os.system ['id']\n",
            "line 1: not YAML .could not determine a constructor",
        ),
        ("yaml", "seed: !!binary aGk=\n", "seed is a bytes, but a text, a number or a list was expected"),
        ("yaml", "set: {run_name: 2024-01-01}\n", "set.run_name is a date, but .*: put a text in quotes"),
        ("toml", "set = {run_name = 2024-01-01T00:00:00}\n", "set.run_name is a datetime"),
        ("yaml", "set: !!set {a, b}\n", "set is a set"),
        ("yaml", "seed: !!bool maybe\n", "not YAML"),
        ("yaml", "seed: \x00\n", "not YAML"),
        ("yaml", "seed: 1\nseed: 2\n", "the name 'seed' occurs twice"),
        ("json", '{"seed": 1, "seed": 2}', 'the key "seed" occurs twice'),
        ("yaml", "epochs: .inf\n", "epochs = inf: expected a finite number"),
        ("json", '{"set": {"max_grad_norm": NaN}}', "set.max_grad_norm is NaN, expected a finite number"),
        ("toml", f"seed = {'9' * 5000}\n", "limit"),
        ("json", '{"model": "\\ud800"}', "expected valid Unicode"),
        ("yaml", "#" * 1_000_001, "has more than 1 MB"),
    ],
)
def test_what_no_recipe_holds_is_one_line(suffix: str, text: str, match: str, tmp_path: Path) -> None:
    """Soon, whatever the file grows to when it is read."""
    path = tmp_path / f"run.{suffix}"
    path.write_text(text, encoding="utf-8")
    started = time.monotonic()
    with pytest.raises(OptionError, match=f"--recipe {path}: .*{match}") as refused:
        read_recipe(path)
    assert "\n" not in str(refused.value)
    assert time.monotonic() - started < 20


def test_anchors_and_a_mark_of_byte_order_are_fine(tmp_path: Path) -> None:
    text = "\ufeffbase: &base {model: m, epochs: 2e0}\nrun:\n  <<: *base\n  epochs: 3\n  data: [&d a.jsonl, *d]\n"
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    settings = read_recipe(tmp_path / "run.yaml", "run")
    assert settings == {"output": "run", "model": "m", "epochs": 3, "data": ["a.jsonl", "a.jsonl"]}
