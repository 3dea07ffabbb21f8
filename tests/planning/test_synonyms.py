"""The commands and the keywords of the scripts that people come from, word for word after the program's name.

Oracles: the same training under our own names; the repositories and the data sets lie on a Hub on this machine.

Covers: cli/other_names.py, loftq/models/foreign_gptq.py.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result
from hub import Hub, datasets_of, serve
from peft import PeftModel

import loftq
from loftq.errors import OptionError
from loftq.planning.synonyms import SYNONYMS, translated
from loftq.settings import declared
from loftq.training.settings import TrainRun, TrainSettings

Run = Callable[..., Result]
LOFTQ_QUANTIZE = """
    --model_name_or_path meta-llama/Llama-2-7b-hf
    --token hf_SomeToken
    --bits 4
    --iter 5
    --rank 16
    --save_dir model_zoo/loftq/
"""
LOFTQ_LLAMA = """
    --model_name_or_path LoftQ/Llama-2-13b-hf-4bit-64rank
    --output_dir exp_results/gsm8k/llama-2-13b/bit4-rank64/lr1e-4
    --learning_rate 1e-4
    --weight_decay 0.1
    --lr_scheduler_type cosine
    --num_warmup_steps 100
    --seed 202
    --dataset_name gsm8k
    --dataset_config main
    --pad_to_max_length
    --max_source_length 128
    --max_target_length 256
    --num_train_epochs 5
    --per_device_train_batch_size 4
    --per_device_eval_batch_size 4
    --gradient_accumulation_steps 4
    --with_tracking
    --report_to tensorboard
"""
LOFTQ_WIKITEXT = """
    --model_name_or_path LoftQ/Llama-2-7b-hf-4bit-64rank
    --output_dir exp_results/wikitext-2/
    --learning_rate 3e-4
    --seed 11
    --dataset_name wikitext
    --dataset_config wikitext-2-raw-v1
    --num_train_epochs 3
    --per_device_train_batch_size 4
    --per_device_eval_batch_size 4
    --gradient_accumulation_steps 2
    --save_strategy "epoch"
    --weight_decay 0.1
    --warmup_ratio 0.03
    --lr_scheduler_type "cosine"
    --logging_steps 1
    --do_train --do_eval
    --logging_steps 50
    --report_to tensorboard
    --block_size 1024
"""
QLORA = """
    --model_name_or_path meta-llama/Llama-2-7b-hf
    --use_auth
    --output_dir ./output/llama-2-guanaco-7b
    --logging_steps 10
    --save_strategy steps
    --data_seed 42
    --save_steps 500
    --save_total_limit 40
    --evaluation_strategy steps
    --eval_dataset_size 1024
    --max_eval_samples 1000
    --per_device_eval_batch_size 1
    --max_new_tokens 32
    --dataloader_num_workers 1
    --group_by_length
    --logging_strategy steps
    --remove_unused_columns False
    --do_train
    --do_eval
    --do_mmlu_eval
    --lora_r 64
    --lora_alpha 16
    --lora_modules all
    --double_quant
    --quant_type nf4
    --bf16
    --bits 4
    --warmup_ratio 0.03
    --lr_scheduler_type constant
    --gradient_checkpointing
    --dataset oasst1
    --source_max_len 16
    --target_max_len 512
    --per_device_train_batch_size 1
    --gradient_accumulation_steps 16
    --max_steps 1875
    --eval_steps 187
    --learning_rate 0.0002
    --adam_beta2 0.999
    --max_grad_norm 0.3
    --lora_dropout 0.1
    --weight_decay 0.0
    --seed 0
    --cache_dir /gscratch/zlab/llama2
"""
QALORA = """
    --base_model "TheBloke/Llama-2-13b-GPTQ"
    --output_dir "PATH_TO_OUTPUT_DIR"
    --batch_size 1
    --num_epochs 3
    --learning_rate 3e-4
    --cutoff_len 512
    --use_qalora
    --qalora_group_size 8
    --eval_step 10
    --save_step 100
    --device "cuda:0"
    --lora_r 4
    --lora_alpha 32
    --lora_dropout 0.05
    --lora_target_modules "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    --push_to_hub
"""
FINLORA = """
    --base_model meta-llama/Llama-3.1-8B-Instruct
    --dataset data.jsonl
    --max_length 128000
    --batch_size 8
    --grad_accu 2
    --learning_rate 1e-4
    --num_epochs 4
    --log_interval 10
    --warmup_ratio 0.03
    --scheduler linear
    --evaluation_strategy steps
    --ds_config config_.json
    --eval_steps 0.05
    --quant_bits 4
    --r 4
    --max_steps -1
"""
GUANACO = "timdettmers/openassistant-guanaco/"
ROWS: dict[str, list[dict[str, str]]] = {
    "openai/gsm8k/main": [{"question": f"What is {i}+1?", "answer": f"It is.\n#### {i + 1}"} for i in range(30)],
    "Salesforce/wikitext/wikitext-2-raw-v1": [{"text": f"The {i} cats sat on the mat all day. "} for i in range(80)],
    GUANACO: [{"text": f"### Human: Is it {i}? ### Assistant: It is {i}."} for i in range(40)],
}


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def hub(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The models of the commands, each a pico llama, and their data sets. The working directory is empty."""
    with serve(Hub()) as served, datasets_of(served.endpoint, tmp_path / "hf"):
        served.tokens.add("hf_SomeToken")
        for name in (LOFTQ_QUANTIZE, LOFTQ_LLAMA, LOFTQ_WIKITEXT, QALORA, FINLORA):
            served.add(shlex.split(name)[1], pico)
        for place, rows in ROWS.items():
            owner, repo, config = place.split("/")
            folder = tmp_path / "sets" / repo
            write(folder / config / "train.jsonl", rows)
            files = f"[{{split: train, path: {config}/*.jsonl}}]"
            if config:
                card = f"---\nconfigs:\n- config_name: {config}\n  data_files: {files}\n---\n"
                (folder / "README.md").write_text(card)
            served.add(f"datasets/{owner}/{repo}", folder)
        monkeypatch.chdir(tmp_path)
        yield served


def planned(run: Run, command: str, *more: str) -> tuple[dict[str, Any], str]:
    """What a command would do, and what it tells."""
    result = run("train", *shlex.split(command), *more, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), result.stderr


@pytest.mark.usefixtures("hub")
def test_the_quantizing_command_of_loftq(run: Run) -> None:
    result = run("quantize", *shlex.split(LOFTQ_QUANTIZE), "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["folder"] == "model_zoo/loftq/Llama-2-7b-hf-4bit-16rank"
    assert (report["recipe"]["iters"], report["recipe"]["rank"], report["recipe"]["bits"]) == (5, 16, 4)


@pytest.mark.usefixtures("hub")
def test_the_training_commands_of_loftq(run: Run) -> None:
    found, told = planned(run, LOFTQ_LLAMA)
    own = "--task gsm8k --data openai/gsm8k:main --cutoff-len 1024 --max-source-length 128 --max-target-length 256"
    rest = "--epochs 5 --batch-size 4 --gradient-accumulation 4 --warmup-steps 100 --seed 202 --output o"
    ours, _ = planned(run, f"LoftQ/Llama-2-13b-hf-4bit-64rank {own} {rest}")
    assert {**found, "seconds": 0, "rate": 0} == {**ours, "seconds": 0, "rate": 0}
    assert "pad_to_max_length: batches are filled up to their longest example" in told
    found, told = planned(run, LOFTQ_WIKITEXT)
    assert found["data"]["examples"] > 0
    assert "save_strategy: a checkpoint is saved ten times in a run" in told


@pytest.mark.usefixtures("hub")
def test_the_command_of_qlora(run: Run) -> None:
    command = QLORA.replace("--lora_r 64", "--lora_r 16")  # the pico is smaller than 64
    found, told = planned(run, command)
    split = {"batch_size": 1, "gradient_accumulation": 16, "gradient_checkpointing": True}
    assert (found["steps"], found["split"]) == (1875, split)
    assert "quant_type: NF4 up to 4 bits" in told
    settings, _ = translated(dict(_pairs(QLORA)))
    assert settings["set"] == {
        "data_seed": "42",
        "dataloader_num_workers": "1",
        "train_sampling_strategy": "group_by_length",
        "adam_beta2": "0.999",
        "max_grad_norm": "0.3",
    }
    assert (settings["data"], settings["task"]) == ("timdettmers/openassistant-guanaco", "clm")


@pytest.mark.usefixtures("hub")
def test_the_command_of_peft_for_qalora(run: Run) -> None:
    found, told = planned(run, QALORA)
    assert found["split"]["batch_size"] == 1
    assert "data: timdettmers/openassistant-guanaco, which the QA-LoRA script trains on by default" in told
    assert "device cuda:0: the first GPU is used" in told
    settings, _ = translated(dict(_pairs(QALORA)))
    assert (settings["adapter"], settings["group_size"], settings["rank"]) == ("qalora", "8", "4")


def test_the_command_of_peft_on_a_gptq_checkpoint(pico: Path, tmp_path: Path, run: Run) -> None:
    """It trains, with pools of 8 inputs on the named modules."""
    options: Any = {"bits": 4, "quant_type": "int", "format": "gptq", "group_size": 32, "rank": 1, "iters": 1}
    base = loftq.quantize(str(pico), output=tmp_path / "gptq", **options).folder
    (base / "loftq.json").unlink()
    data, out = write(tmp_path / "data.jsonl", ROWS[GUANACO]), tmp_path / "out"
    command = QALORA.replace("TheBloke/Llama-2-13b-GPTQ", str(base)).replace("PATH_TO_OUTPUT_DIR", str(out))
    words = shlex.split(command.replace("--push_to_hub", "").replace(",gate_proj,up_proj,down_proj", ""))
    result = run("train", *words, "--task", "clm", "--data", data, "--max_steps", 2, "--quiet")
    assert result.exit_code == 0, result.stderr
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 32, 0.05)
    assert (config["use_qalora"], config["qalora_group_size"]) == (True, 8)
    assert sorted(config["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]


@pytest.mark.usefixtures("hub")
def test_the_command_and_the_entries_of_finlora(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", [{"context": f"Is it {i}?", "target": str(i)} for i in range(30)])
    found, told = planned(run, FINLORA, "--column", "prompt=context", "--column", "response=target")
    assert found["split"] == {"batch_size": 8, "gradient_accumulation": 2, "gradient_checkpointing": False}
    assert "output: data.jsonl-meta-llama-Llama-3.1-8B-Instruct-4bits-r4, as in the script" in told
    entry = {"base_model": "meta-llama/Llama-3.1-8B-Instruct", "dataset_path": "data.jsonl", "lora_r": 8}
    more = {"quant_bits": 8, "learning_rate": 1e-4, "num_epochs": 4, "batch_size": 8, "peft_use_rslora": True}
    (tmp_path / "finetune_configs.json").write_text(json.dumps({"mine_8bits_r8_rslora": {**entry, **more}}))
    found, _ = planned(run, "mine_8bits_r8_rslora", "--column", "prompt=context", "--column", "response=target")
    assert found["split"]["batch_size"] == 8


def _pairs(command: str) -> Iterator[tuple[str, Any]]:
    words = shlex.split(command)
    for place, word in enumerate(words):
        if word.startswith("--"):
            following = words[place + 1] if place + 1 < len(words) else "--"
            yield word[2:], True if following.startswith("--") else following


def test_our_own_names_stay() -> None:
    values = {"token": "t", "trust_remote_code": True, "lora_r": 4}
    settings, notes = translated(values, own=("token", "trust_remote_code"))
    assert (settings, notes) == ({"token": "t", "trust_remote_code": True, "rank": 4}, [])


def test_arguments_passed_through_stay_beside_those_that_are_set() -> None:
    values = {"max_grad_norm": 0.3, "group_by_length": True, "set": {"optim": "sgd"}}
    settings, _ = translated(values)
    passed = {"max_grad_norm": 0.3, "train_sampling_strategy": "group_by_length"}
    assert settings == {"set": {**passed, "optim": "sgd"}}
    settings, _ = translated({**values, "group_by_length": False, "set": {"max_grad_norm": 1.0}})
    assert settings == {"set": {"max_grad_norm": 1.0}}


def test_every_name_means_a_setting_or_says_why_not() -> None:
    ours = {**declared(TrainSettings), **declared(TrainRun)}
    for name, row in SYNONYMS.items():
        assert name not in ours
        assert (row.setting in ours) != (row.setting is None and bool(row.note or row.refusal)), name


def test_the_page_has_these_commands() -> None:
    page = (Path(__file__).parents[2] / "docs" / "commands-of-scripts.md").read_text(encoding="utf-8")
    for command in (LOFTQ_QUANTIZE, LOFTQ_LLAMA, LOFTQ_WIKITEXT, QLORA, QALORA, FINLORA):
        assert " ".join(command.split()) in " ".join(page.split())


@pytest.mark.usefixtures("hub")
def test_options_of_other_commands_of_loftq() -> None:
    command = """--model_name_or_path meta-llama/Llama-2-7b-hf --learning_rate 3e-4 --seed 11 --rank 64 --bits 4
        --lora_alpha 16 --lora_init --expt_name gsm8k_llama2_7b_4bit_64rank_qlora --output_dir exp_results/
        --num_train_epochs 6 --evaluation_strategy "no" --save_strategy "epoch" --report_to tensorboard"""
    settings, notes = translated(dict(_pairs(command)))
    assert settings == {
        "model": "meta-llama/Llama-2-7b-hf",
        "learning_rate": "3e-4",
        "seed": "11",
        "rank": "64",
        "bits": "4",
        "alpha": "16",
        "method": "qlora",
        "output": "exp_results/gsm8k_llama2_7b_4bit_64rank_qlora",
        "epochs": "6",
        "report_to": "tensorboard",
    }
    assert [note.partition(":")[0] for note in notes] == ["evaluation_strategy", "save_strategy"]


def test_what_is_replaced_is_named(run: Run, pico: Path) -> None:
    for arguments, message in {
        ("--trust_remote_code", "true"): "trust_remote_code: quantize the model first: `loftq quantize MODEL --trust",
        ("--adapter_name_or_path", "x"): "adapter_name_or_path: `loftq evaluate DIR --adapter` takes an adapter",
        ("--use_dora",): "use_dora: loftq trains LoRA and has no DoRA",
        ("--hub_token", "hf_Secret"): "hub_token: a token on a command line ends up in the shell's history",
        ("--lora_r",): "Option '--lora_r' requires an argument",
        ("--lora_q", "4"): "No such option",
    }.items():
        refused = run("train", pico, "--data", "d.jsonl", "--output", "o", *arguments)
        assert refused.exit_code == 2
        assert message in refused.stderr
        assert "hf_Secret" not in refused.stderr
    with pytest.raises(OptionError, match=r"'num_train_epochs'; did you mean epochs"):
        loftq.train(pico, data="d", output="o", num_train_epochs=3)  # type: ignore[call-arg]


def test_the_keywords_of_the_drop_in_layer() -> None:
    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))

    theirs: Any = {"mlp_layers": ["0", "2"], "alpha": 8, "r": 4, "require_lora": True, "use_qlora": True}
    layer = loftq.quantize_model(module=network(), **theirs)
    ours = loftq.quantize_model(network(), ["0", "2"], alpha=8, rank=4, lora=True, quantize=True)
    assert isinstance(layer, PeftModel)
    inputs = torch.randn(3, 64)
    assert torch.equal(layer(inputs), ours(inputs))
    with pytest.raises(OptionError, match="r and rank are the same: leave one of the two out"):
        loftq.quantize_model(network(), r=4, rank=4)
