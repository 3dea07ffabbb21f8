"""Training. Oracles: a stock peft load, the same run without evaluations or in one piece, the bytes of the backbone.

Covers: cli/train.py, loftq/training/arguments.py, loftq/training/callbacks.py, loftq/training/open_model.py,
loftq/training/process.py, loftq/training/run_folder.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from conftest import pico_llama, save_model
from peft import PeftModel
from picos import save_pico
from processes import run_python
from rows import articles, problems, reviews, sums, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import loftq
from loftq.errors import ArtifactError, LoftQError, OptionError, OutputError
from loftq.models import loading
from loftq.models.adapters import TRAINING_RECORD
from loftq.training import train
from loftq.training.arguments import arguments_of
from loftq.training.model import find_model
from loftq.training.open_model import mode_of
from loftq.training.settings import TrainSettings

Run = Callable[..., Any]
FAST: dict[str, Any] = {"max_steps": 20, "learning_rate": 3e-2, "batch_size": 4, "quiet": True, "dtype": "float32"}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def artifact(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "out"
    return loftq.quantize(str(pico), output=folder, rank=4, iters=2, quiet=True).folder


@pytest.fixture(scope="module")
def pooled(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "pooled"
    return loftq.quantize(str(pico), output=folder, adapter="qalora", rank=4, group_size=16, quiet=True).folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_rows(tmp_path_factory.mktemp("data") / "sums.jsonl", sums()))


def losses(folder: Path, kind: str = "loss") -> list[float]:
    history = json.loads((folder / TRAINING_RECORD).read_text())["history"]
    return [entry[kind] for entry in history if kind in entry]


@pytest.mark.parametrize("kind", ["qlora", "qalora", "lora"])
def test_every_kind_learns(kind: str, artifact: Path, pooled: Path, pico: Path, data: str, tmp_path: Path) -> None:
    model, new = {"qlora": (artifact, {}), "qalora": (pooled, {}), "lora": (pico, {"adapter": "lora", "rank": 4})}[kind]
    result = loftq.train(str(model), data=data, output=tmp_path / "out", **{**FAST, **new})
    found = losses(tmp_path / "out")
    assert found[-1] < 0.9 * found[0]
    assert result.train_loss == found[-1]
    assert result.evaluation["loss"] == losses(tmp_path / "out", "eval_loss")[-1]
    assert result.examples == 38  # of 40, two are held out
    weights = load_file(tmp_path / "out" / WEIGHTS)
    assert result.trainable == sum(weight.numel() for weight in weights.values())
    assert result.total == sum(p.numel() for p in pico_llama().parameters()) + result.trainable
    assert not list((tmp_path / "out").glob("*.bin"))


def test_stock_peft_loads_what_was_trained(artifact: Path, data: str, tmp_path: Path) -> None:
    loftq.train(str(artifact), data=data, output=tmp_path / "out", **FAST)
    base = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.bfloat16)
    loading.guard_cpu(base)
    theirs = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    ours = loftq.load_qlora(artifact, tmp_path / "out", is_trainable=False).eval()
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits.float(), ours(tokens).logits.float(), atol=0.05)
    start = load_file(artifact / "loftq_init" / WEIGHTS)
    assert all(not torch.equal(start[name], value) for name, value in load_file(tmp_path / "out" / WEIGHTS).items())


def adapter_after(artifact: Path, data: str, folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    loftq.train(str(artifact), data=data, output=folder, **{**FAST, "max_steps": 3, **changes})
    return dict(load_file(folder / WEIGHTS))


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Of every step, as the optimizer gets them."""
    found: list[torch.Tensor] = []

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, _args: Any, _state: Any, _control: Any, model: Any = None, **_: Any) -> None:
            found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone())

    made = train._trainer
    monkeypatch.setattr(train, "_trainer", lambda *a, **k: [t := made(*a, **k), t.add_callback(Recorder())][0])
    return found


def test_evaluations_leave_gradients_as_they_are(
    artifact: Path, data: str, tmp_path: Path, gradients: list[torch.Tensor]
) -> None:
    """An evaluation at every step against none before the end, in bfloat16, as bitsandbytes' repacking has it."""
    changes = {"dtype": "bfloat16"}
    adapter_after(artifact, data, tmp_path / "with", eval_steps=1, **changes)
    adapter_after(artifact, data, tmp_path / "without", eval_steps=3, **changes)
    assert len(gradients) == 6
    for with_evaluations, without in zip(gradients[:3], gradients[3:], strict=True):
        assert torch.equal(with_evaluations, without)


@pytest.mark.skipif(not has_avx512bf16(), reason="this CPU has no AVX512-BF16, for which bitsandbytes repacks")
def test_without_the_guard_evaluations_spoil_gradients(
    artifact: Path, data: str, tmp_path: Path, gradients: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the test above can fail."""
    monkeypatch.setattr(loading, "guard_cpu", lambda _: None)
    for steps in (1, 3):
        try:
            adapter_after(artifact, data, tmp_path / str(steps), eval_steps=steps, dtype="bfloat16")
        except (AssertionError, RuntimeError):
            return  # some shapes it refuses
    assert not all(torch.equal(a, b) for a, b in zip(gradients[:3], gradients[3:], strict=True))


@contextmanager
def killed_after(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Killer(TrainerCallback):
        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step == step:
                raise KeyboardInterrupt

    made = train._trainer
    with monkeypatch.context() as patch:
        patch.setattr(train, "_trainer", lambda *a, **k: [t := made(*a, **k), t.add_callback(Killer())][0])
        yield


def options(data: str, output: Path, *, save_steps: int) -> list[Any]:
    """Of a run of eight steps, as on the command line."""
    asked = ["--data", data, "--output", output, "--max-steps", 8, "--save-steps", save_steps, "--dtype", "float32"]
    return [*asked, "--learning-rate", 3e-2, "--batch-size", 4, "--quiet"]


@pytest.fixture(scope="module")
def whole(artifact: Path, data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The adapter of a run of eight steps in one piece."""
    return adapter_after(artifact, data, tmp_path_factory.mktemp("whole") / "out", max_steps=8)


@pytest.fixture(scope="module")
def cut(artifact: Path, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run, with a checkpoint every other step, cut off after the fifth. Do not write to it."""
    folder = tmp_path_factory.mktemp("cut") / "out"
    with pytest.MonkeyPatch.context() as patch, killed_after(5, patch), pytest.raises(KeyboardInterrupt):
        loftq.train(str(artifact), data=data, output=folder, **{**FAST, "max_steps": 8, "save_steps": 2})
    return folder


def test_a_killed_training_ends_in_the_same_loss(
    artifact: Path, data: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off after step 5, with a checkpoint at 4; oracle: the run in one piece."""
    whole = adapter_after(artifact, data, tmp_path / "whole", max_steps=8, save_steps=4)

    asked = options(data, tmp_path / "cut", save_steps=4)
    with killed_after(5, monkeypatch):
        assert run("train", artifact, *asked).exit_code == 130
    assert not (tmp_path / "cut" / WEIGHTS).exists()
    again = run("train", artifact, *asked)
    assert again.exit_code == 1
    assert "holds an unfinished training: add --resume" in again.stderr
    other = run("train", artifact, *asked, "--seed", 3, "--resume")
    assert "was begun with another seed" in other.stderr
    assert run("train", artifact, *asked, "--resume").exit_code == 0
    found = load_file(tmp_path / "cut" / WEIGHTS)
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    assert losses(tmp_path / "cut")[-1] == losses(tmp_path / "whole")[-1]
    assert losses(tmp_path / "cut", "eval_loss")[-1] == losses(tmp_path / "whole", "eval_loss")[-1]
    assert "holds a finished training" in run("train", artifact, *asked).stderr
    refused = run("train", artifact, *asked, "--overwrite", "--column", "prompt=ask")
    assert refused.exit_code == 2
    assert (tmp_path / "cut" / WEIGHTS).is_file()  # what was there stays until a new run begins
    assert run("train", artifact, *asked, "--overwrite").exit_code == 0


def test_the_same_command_goes_on_until_it_is_done(
    artifact: Path, data: str, whole: Any, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a requeued job has it: with --resume from the first time on."""
    asked = [*options(data, tmp_path / "cut", save_steps=2), "--resume"]
    with killed_after(5, monkeypatch):
        assert run("train", artifact, *asked).exit_code == 130
    assert run("train", artifact, *asked).exit_code == 0
    found = load_file(tmp_path / "cut" / WEIGHTS)
    assert all(torch.equal(whole[name], found[name]) for name in whole)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("trainer_state.json", 0),
        pytest.param("optimizer.pt", 0, marks=pytest.mark.slow),
        pytest.param("scheduler.pt", 0, marks=pytest.mark.slow),
        pytest.param("rng_state.pth", 0, marks=pytest.mark.slow),
        ("optimizer.pt", 500),
        (WEIGHTS, 500),
    ],
)
def test_a_checkpoint_that_was_cut_off_is_passed_over(
    name: str, left: int, artifact: Path, data: str, whole: Any, cut: Path, tmp_path: Path, run: Run
) -> None:
    """Oracle: the run in one piece."""
    shutil.copytree(cut, tmp_path / "cut")
    asked = options(data, tmp_path / "cut", save_steps=2)
    damaged = tmp_path / "cut" / "checkpoint-4" / name
    kept = damaged.read_bytes()[:left]
    damaged.unlink()
    if kept:
        damaged.write_bytes(kept)
    done = run("train", artifact, *asked, "--resume")
    assert done.exit_code == 0, done.stderr
    assert "checkpoint-4 is incomplete: training continues from checkpoint-2" in done.stderr
    found = load_file(tmp_path / "cut" / WEIGHTS)
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def test_what_trains_is_said_first(artifact: Path, data: str, tmp_path: Path, run: Run) -> None:
    asked = ["--data", data, "--output", tmp_path / "out", "--max-steps", 1]
    loud = run("train", artifact, *asked)
    assert "8,192 of 123,200 parameters train (6.65 %)" in loud.stderr
    assert loud.stderr.index("parameters train") < loud.stderr.index("step 1: loss")
    assert "parameters train" not in run("train", artifact, *asked, "--overwrite", "--quiet").stderr


def test_each_kind_has_its_rate(artifact: Path, pooled: Path, pico: Path, data: str) -> None:
    """As the help has them; the rate asked for goes before."""
    for model, adapter, rate in (
        (artifact, None, 2e-4),
        (pooled, None, 1e-3),
        (pico, "lora", 2e-4),
        (pico, "qalora", 1e-3),
    ):
        asked = TrainSettings(model=str(model), data=(data,), output="out", adapter=adapter)
        mode = mode_of(asked, find_model(asked.model))
        assert arguments_of(asked, mode).learning_rate == rate
        asked = replace(asked, learning_rate=3e-5)
        assert arguments_of(asked, mode).learning_rate == 3e-5


def test_evaluation_data_of_its_own(artifact: Path, data: str, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "eval.jsonl", sums(3))
    result = loftq.train(str(artifact), data=data, eval_data=str(other), output=tmp_path / "out", **FAST)
    assert result.examples == 40
    assert len(losses(tmp_path / "out", "eval_loss")) == 10  # of twenty steps


@pytest.mark.slow
def test_when_to_evaluate_can_be_set(artifact: Path, data: str, tmp_path: Path) -> None:
    """Never, after each epoch, and as often as schedulers and the choice of the best need."""
    adapter_after(artifact, data, tmp_path / "no", set={"eval_strategy": "no"})
    assert len(losses(tmp_path / "no", "eval_loss")) == 1  # of the end
    adapter_after(artifact, data, tmp_path / "epoch", set={"eval_strategy": "epoch"}, max_steps=20)
    assert len(losses(tmp_path / "epoch", "eval_loss")) == 2  # of ten steps each
    adapter_after(artifact, data, tmp_path / "plateau", lr_scheduler="reduce_lr_on_plateau")
    # The best is what has the greatest loss here, for the last checkpoint surely has not.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    adapter_after(artifact, data, tmp_path / "best", set=best, max_steps=10)
    found = losses(tmp_path / "best", "eval_loss")
    assert found[-1] == pytest.approx(max(found[:-1]), abs=1e-4)
    assert found[-1] > found[-2]


def test_no_repository_for_what_is_no_artifact(pico: Path, data: str, tmp_path: Path, run: Run) -> None:
    """Said before a weight is read."""
    folder = shutil.copytree(pico, tmp_path / "model")
    (folder / "model.safetensors").write_bytes((pico / "model.safetensors").read_bytes()[:-64] + b"\xff" * 64)
    asked = ["--adapter", "lora", "--rank", 4, "--data", data, "--output", tmp_path / "out", "--push-to-hub", "me/it"]
    refused = run("train", folder, *asked)
    assert refused.exit_code == 2
    assert "--push-to-hub applies only to an artifact of loftq" in refused.stderr
    assert "parameters train" not in refused.stderr


def test_gradient_checkpointing_gives_the_same(artifact: Path, data: str, tmp_path: Path) -> None:
    plain = adapter_after(artifact, data, tmp_path / "plain")
    less = adapter_after(artifact, data, tmp_path / "less", gradient_checkpointing=True)
    assert all(torch.allclose(plain[name], less[name], atol=1e-5) for name in plain)


def test_other_training_arguments(artifact: Path, data: str, tmp_path: Path) -> None:
    changes = {"set": {"max_grad_norm": 1e-9, "logging_steps": 1}, "report_to": ("tensorboard",)}
    clipped = adapter_after(artifact, data, tmp_path / "out", **changes, optim="sgd")
    start = load_file(artifact / "loftq_init" / WEIGHTS)
    assert all(torch.allclose(start[name], clipped[name], atol=1e-6) for name in start)
    assert len(losses(tmp_path / "out")) == 3
    assert list((tmp_path / "out").glob("**/events.out.tfevents*"))


def test_an_entry_of_finlora_runs_as_it_is(
    pico: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl", [{"context": row["prompt"], "target": row["response"]} for row in sums(12)])
    entry = {
        "base_model": str(pico),
        "dataset_path": "train.jsonl",
        "lora_r": 4,
        "quant_bits": 8,
        "learning_rate": 1e-3,
        "num_epochs": 1,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    (tmp_path / "finetune_configs.json").write_text(json.dumps({"sums_pico_8bits_r4": entry}))
    result = run("train", "--recipe", "finetune_configs.json", "sums_pico_8bits_r4", "--quiet", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["steps"] == 2  # 11 examples, 4 at a time, two to a step
    assert (tmp_path / "sums_pico_8bits_r4" / WEIGHTS).is_file()
    config = json.loads((tmp_path / "sums_pico_8bits_r4" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 16)  # FinLoRA's default, whatever the rank
    assert Path(config["base_model_name_or_path"]).name.startswith("pico-llama-8bit-4rank")


@pytest.mark.parametrize("family", ["bart", pytest.param("t5", marks=pytest.mark.slow)])
def test_summaries_by_encoder_decoders(family: str, tmp_path: Path) -> None:
    folder = save_pico(family, "seq2seq-lm", tmp_path / family)
    made = loftq.quantize(str(folder), output=tmp_path / "made", rank=4, quiet=True).folder
    data = str(write_rows(tmp_path / "a.jsonl", articles()))
    loftq.train(str(made), task="summarization", data=data, output=tmp_path / "out", **FAST)
    found = losses(tmp_path / "out")
    assert found[-1] < 0.9 * found[0]


def test_classes_are_learned_with_the_head(tmp_path: Path) -> None:
    folder = save_pico("bert", "masked-lm", tmp_path / "bert")
    options: dict[str, Any] = {"task": "sequence-classification", "num_labels": 2, "rank": 4, "quiet": True}
    made = loftq.quantize(str(folder), output=tmp_path / "made", **options).folder
    data = str(write_rows(tmp_path / "a.jsonl", reviews()))
    result = loftq.train(
        str(made), task="classification", data=data, output=tmp_path / "out", **{**FAST, "max_steps": 30}
    )
    assert result.evaluation["accuracy"] == 1.0
    found = loftq.evaluate(str(made), adapter=str(tmp_path / "out"), task="classification", data=data, quiet=True)
    assert found.rows["trained"]["accuracy"] == 1.0
    assert found.rows["trained"]["matthews"] == 1.0


def test_a_dry_run_reads_headers_alone(artifact: Path, pico: Path, data: str, tmp_path: Path, run: Run) -> None:
    result = run("train", artifact, "--data", data, "--output", tmp_path / "out", "--dry-run", "--json")
    found = json.loads(result.stdout)
    trained = loftq.train(str(artifact), data=data, output=tmp_path / "real", **{**FAST, "max_steps": 1})
    assert (found["trainable"], found["total"]) == (trained.trainable, trained.total)
    assert found["memory"] == found["weights"] + found["adapter"] + found["activations"]
    assert not (tmp_path / "out").exists()
    new = run("train", pico, "--rank", 4, "--data", data, "--output", tmp_path / "out", "--dry-run", "--json")
    assert json.loads(new.stdout)["trainable"] == found["trainable"]
    less = ["--gradient-checkpointing", "--batch-size", 1]
    smaller = run("train", artifact, "--data", data, "--output", tmp_path / "out", "--dry-run", "--json", *less)
    assert json.loads(smaller.stdout)["activations"] < found["activations"] / 8


@pytest.mark.slow
def test_training_loads_no_compiler(artifact: Path, data: str, tmp_path: Path) -> None:
    """Which is memory that the same run in stock libraries does not take."""
    code = (
        "import sys, loftq; loftq.train(sys.argv[1], data=sys.argv[2], output=sys.argv[3], max_steps=1, quiet=True); "
        "print('bitsandbytes' in sys.modules, [name for name in ('numba', 'llvmlite') if name in sys.modules])"
    )
    done = run_python(code, artifact, data, tmp_path / "out", level="torch")
    assert done.stdout.split("\n")[-2] == "True []", done.stderr


# What torchrun does after it has read its options, but with processes that are forks.
FORKED_RUN = """
import sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from loftq_cli.main import main

one_machine = {"min_nodes": 1, "max_nodes": 1, "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
elastic_launch(LaunchConfig(**one_machine, nproc_per_node=2, start_method="fork"), main)(sys.argv[1:])
"""


@pytest.mark.parametrize("launcher", ["forks", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_processes_train_together(launcher: str, artifact: Path, data: str, tmp_path: Path) -> None:
    """`torchrun` of the same command; oracle: one process with twice the batch."""
    options = ["--data", data, "--output", str(tmp_path / "two"), "--max-steps", "2", "--dtype", "float32", "--cpu"]
    options += ["--batch-size", "2", "--eval-steps", "2", "--lr-scheduler", "constant", "--optim", "sgd"]
    if launcher == "forks":
        done = run_python(FORKED_RUN, "train", artifact, *options)
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*torchrun, "-m", "loftq_cli.main", "train", str(artifact), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("adapter in") == 1
    record = json.loads((tmp_path / "two" / TRAINING_RECORD).read_text())
    assert record["result"]["steps"] == 2
    one = {"max_steps": 2, "batch_size": 4, "eval_steps": 2, "lr_scheduler": "constant", "optim": "sgd"}
    alone = loftq.train(str(artifact), data=data, output=tmp_path / "one", dtype="float32", cpu=True, quiet=True, **one)
    assert record["result"]["evaluation"]["loss"] == pytest.approx(alone.evaluation["loss"], abs=2e-3)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"columns": {"prompt": "ask"}}, r"--column prompt=ask: the data has no such column \(columns: prompt, resp"),
        ({"task": "classification"}, "needs a sequence-classification model"),
        ({"task": "summarization"}, r"no column for the document \(looked for: document, article"),
        ({"dtype": "float16", "cpu": True}, "--dtype float16 is not supported on a CPU: use bfloat16 or float32"),
        ({"adapter": "qalora"}, "is a qlora artifact"),
        ({"rank": 8}, r"--rank 8: .* is quantized already, with 4"),
        (
            {"chat_template": True, "task": "clm"},
            r"--chat-template: clm has no prompts: leave it out, or use --task sft or gsm8k",
        ),
        ({"task": "clm"}, "no column for the text"),
        ({"set": {"group_by_length": True}}, "unknown TrainingArguments name"),
        ({"set": {"save_only_model": True}}, "a training cannot continue from such checkpoints"),
        ({"set": {"max_grad_norm": "abc"}}, "--set max_grad_norm=abc: expected a number"),
        ({"set": {"auto_find_batch_size": "no"}}, "--set auto_find_batch_size=no: expected true or false"),
        ({"set": {"adam_beta1": 2}}, "transformers refuses these settings: .*beta"),
        ({"set": {"fsdp": "full_shard"}}, "--set fsdp: cannot be changed, because `accelerate launch` sets it"),
        ({"set": {"deepspeed": "zero3.json"}}, "--set deepspeed: cannot be changed"),
        ({"report_to": ("foo",)}, "transformers refuses these settings: .*foo"),
        ({"optim": "lomo"}, "transformers refuses these settings: .*lomo"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "transformers refuses these settings: .*min_lr"),
        ({"lr_scheduler": "warmup_stable_decay"}, "transformers refuses these settings"),
    ],
)
def test_what_cannot_be_trained_is_said_before(
    changes: dict[str, Any], problem: str, artifact: Path, data: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=problem):
        loftq.train(str(artifact), data=data, output=tmp_path / "out", **{**FAST, **changes})
    assert not any((tmp_path / "out").glob("*"))


def test_folders_in_the_way(artifact: Path, data: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds other files"):
        loftq.train(str(artifact), data=data, output=tmp_path, overwrite=True, **FAST)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(ArtifactError, match="is an adapter's folder"):
        loftq.train(str(artifact / "loftq_init"), data=data, output=tmp_path / "out", **FAST)


def test_an_adapter_of_another_backbone(artifact: Path, pooled: Path, pico: Path, data: str, tmp_path: Path) -> None:
    """With training.json to tell, though what it was trained on is gone, and of the stock peft's by its shapes."""
    here = shutil.copytree(artifact, tmp_path / "here")
    other = loftq.quantize(str(pico), output=tmp_path / "other", rank=4, iters=1, quiet=True).folder
    twin = save_model(pico_llama(rms_norm_eps=1e-5), tmp_path / "twin")  # of the same weights
    stranger = pico_llama()
    stranger.model.layers[1].mlp.up_proj.weight.data *= 1.5
    save_model(stranger, tmp_path / "stranger")
    save_model(pico_llama(hidden_size=32), tmp_path / "narrow")
    save_pico("bert", "masked-lm", tmp_path / "bert")
    loftq.train(str(here), data=data, output=tmp_path / "out", **{**FAST, "max_steps": 1})
    plain = {**FAST, "max_steps": 1, "adapter": "lora", "rank": 4}
    loftq.train(str(pico), data=data, output=tmp_path / "plain", **plain)
    with pytest.raises(ArtifactError, match="takes a QA-LoRA"):
        loftq.evaluate(str(pooled), adapter=str(tmp_path / "out"), data=data, task="gsm8k")
    with pytest.raises(ArtifactError, match="counts the rounding error twice"):
        loftq.generate(str(pico), "x", adapter=str(tmp_path / "out"))
    shutil.rmtree(here)

    def refused(model: Path, adapter: str, match: str) -> None:
        with pytest.raises(ArtifactError, match=match):
            loftq.generate(str(model), "x", adapter=str(tmp_path / adapter), max_new_tokens=1)

    refused(other, "out", "was trained on .*here, not on the backbone .*other")
    refused(other, "out/checkpoint-1", "was trained on .*here, not on the backbone .*other")
    refused(pico, "out", "was trained on .*here, whose weights differ from those of")
    refused(artifact, "plain", "was trained on .*pico-llama, not on the backbone")
    refused(tmp_path / "stranger", "plain", "was trained on .*pico-llama, whose weights differ from those of")
    for model, adapter in ((artifact, "out"), (artifact, "out/checkpoint-1"), (pico, "plain"), (twin, "plain")):
        loftq.generate(str(model), "x", adapter=str(tmp_path / adapter), max_new_tokens=1)
    (tmp_path / "plain" / TRAINING_RECORD).unlink()
    refused(
        tmp_path / "narrow",
        "plain",
        "does not fit .*narrow: .* 128 inputs and 64 outputs, but the module has 128 and 32",
    )
    refused(tmp_path / "bert", "plain", "adapts 'model.layers.0.* does not have")


def test_an_adapter_on_somebody_elses_gptq(pico: Path, data: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rank": 2, "group_size": 32, "format": "gptq", "quant_type": "int", "quiet": True}
    theirs = loftq.quantize(str(pico), output=tmp_path / "theirs", **options).folder
    (theirs / "loftq.json").unlink()
    shutil.rmtree(theirs / "loftq_init")
    short = {**FAST, "max_steps": 1, "rank": 2}
    loftq.train(str(theirs), data=data, output=tmp_path / "out", **short)
    loftq.train(str(pico), data=data, output=tmp_path / "plain", adapter="lora", **short)
    loftq.generate(str(theirs), "x", adapter=str(tmp_path / "out"), max_new_tokens=1)
    with pytest.raises(ArtifactError, match=r"whose weights differ from those of .*theirs"):
        loftq.generate(str(theirs), "x", adapter=str(tmp_path / "plain"), max_new_tokens=1)
    with pytest.raises(ArtifactError, match=r"whose weights differ from those of .*pico-llama"):
        loftq.generate(str(pico), "x", adapter=str(tmp_path / "out"), max_new_tokens=1)
    (tmp_path / "plain/training.json").unlink()  # then peft's own name of the base model tells
    with pytest.raises(ArtifactError, match=r"full-precision weights of .*pico-llama, not on the quantized .*theirs"):
        loftq.load_qalora(theirs, tmp_path / "plain")


def test_full_memory_says_what_lowers_the_need(
    artifact: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator's own error, for a batch that no memory holds."""

    def huge(*_: Any, **__: Any) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(Trainer, "training_step", huge)
    with pytest.raises(LoftQError, match="out of memory: lower --batch-size"):
        loftq.train(str(artifact), data=data, output=tmp_path / "out", **FAST)


def test_the_in_memory_layer_trains_with_the_plain_trainer(tmp_path: Path) -> None:
    """On a network that is no transformer: two dense layers that learn a parity."""
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)
            self.out = torch.nn.Linear(64, 2)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.out(torch.relu(self.fc2(torch.relu(self.fc1(x)))))
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    net = loftq.quantize_model(Net(), target_modules=["fc1", "fc2"], bits=4, rank=8, iters=2)
    inputs = torch.randn(64, 64)
    rows = [{"x": row, "labels": (row[:2].sum() > 0).long()} for row in inputs]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found: list[float] = []

    class Keep(TrainerCallback):
        def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
            found.extend([logs["loss"]] if "loss" in logs else [])

    arguments = TrainingArguments(
        str(tmp_path), max_steps=40, per_device_train_batch_size=16, learning_rate=1e-2, use_cpu=True, report_to="none",
        logging_steps=1, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model=net, args=arguments, train_dataset=rows, callbacks=[Keep()]).train()
    assert sum(found[-5:]) < 0.2 * sum(found[:5])
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name or name.startswith("out.") or "base_layer" not in name for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blocks", "training"),
    [
        (2, {"max_steps": 50, "learning_rate": 7e-3, "batch_size": 4, "lr_scheduler": "constant"}),
        pytest.param(4, {"max_steps": 150, "learning_rate": 5e-3}, marks=pytest.mark.slow),
    ],
)
def test_loss_falls_on_plain_text(blocks: int, training: dict[str, Any], tmp_path: Path) -> None:
    """A larger pico model on Shakespeare, packed."""
    sizes = {"hidden_size": 128, "num_hidden_layers": blocks, "intermediate_size": 256}
    folder = save_model(pico_llama(**sizes), tmp_path / "model")
    made = loftq.quantize(str(folder), output=tmp_path / "made", rank=8, quiet=True).folder
    text = Path(__file__).parent.parent.parent / "benchmarks" / "data" / "shakespeare.txt"
    options: dict[str, Any] = {"task": "clm", "cutoff_len": 128, "dtype": "float32", "quiet": True}
    loftq.train(str(made), data=str(text), output=tmp_path / "out", **options, **training)
    assert losses(tmp_path / "out")[-1] < 0.88 * losses(tmp_path / "out")[0]


def test_problems_are_learned(artifact: Path, tmp_path: Path) -> None:
    data = str(write_rows(tmp_path / "a.jsonl", problems(24)))
    loftq.train(str(artifact), task="gsm8k", data=data, output=tmp_path / "out", **FAST)
    assert losses(tmp_path / "out")[-1] < 0.9 * losses(tmp_path / "out")[0]
