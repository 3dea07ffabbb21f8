"""Training under FSDP 2. Oracle: one process with twice the batch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rows import sums, write_rows
from safetensors.torch import load_file

import loftq
from loftq.errors import OptionError
from loftq.models.adapters import TRAINING_RECORD
from loftq.training.model import find_model
from loftq.training.sharding import check_launcher

WEIGHTS = "adapter_model.safetensors"
FORMATS: dict[str, dict[str, Any]] = {"nf2": {"bits": 2}, "bitsandbytes-fsdp": {"format": "bitsandbytes-fsdp"}}
# accelerate uses FSDP on GPUs alone, so its state is changed here. Each process says how much of the codes it holds.
RUNNER = """
import sys
import transformers
from accelerate import state
from accelerate.utils import DistributedType

begin = state.AcceleratorState.__init__

def with_fsdp(self, *args, **options):
    first = "_mixed_precision" not in self._shared_state
    begin(self, *args, **options)
    if first and options.get("fsdp_plugin") is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, options["fsdp_plugin"]
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

class Told(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, model, **kwargs):
        codes = [p for name, p in model.named_parameters() if name.endswith("base_layer.weight")]
        held = sum(p.to_local().numel() for p in codes), sum(p.numel() for p in codes)
        print(f"held {held[0]} of {held[1]}", file=sys.stderr, flush=True)

state.AcceleratorState.__init__ = with_fsdp
transformers.trainer.DEFAULT_CALLBACKS.append(Told)
from loftq_cli.main import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loftq.quantize(
        str(pico), output=tmp_path_factory.mktemp("bytes") / "out", iters=1, rank=4, quiet=True
    ).folder


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "uses DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true"}, "has fsdp_version 1, .*expected fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "True", "FSDP_VERSION": "1"}, "has fsdp_version 1"),
    ],
)
def test_configurations_that_are_refused(
    environment: dict[str, str], problem: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match=problem):
        check_launcher(find_model(str(folder)))


def test_bytes_that_stay_whole_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check_launcher(find_model(str(folder)))
    assert not caplog.records
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with caplog.at_level("INFO", "loftq"):
        check_launcher(find_model(str(folder)))
    assert "which FSDP leaves whole on each device" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_two_processes_split_the_model(name: str, pico: Path, tmp_path: Path) -> None:
    """`accelerate launch` with the file of `loftq config`, whole and continued from its first checkpoint."""
    made = loftq.quantize(str(pico), output=tmp_path / "made", rank=4, iters=1, quiet=True, **FORMATS[name]).folder
    data = str(write_rows(tmp_path / "sums.jsonl", sums()))
    options: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "lr_scheduler": "constant"}
    options |= {"warmup_steps": 0, "optim": "adamw_torch", "dtype": "float32", "eval_steps": 2}
    alone = loftq.train(str(made), data=data, output=tmp_path / "one", batch_size=4, cpu=True, quiet=True, **options)

    settings = loftq.config(made, "accelerate-fsdp").text.replace("bf16", "'no'")
    (tmp_path / "fsdp.yaml").write_text(settings)
    (tmp_path / "runner.py").write_text(RUNNER)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "fsdp.yaml"]
    given = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    command = [*launch, tmp_path / "runner.py", "train", made, "--data", data, "--output", tmp_path / "two", "--cpu"]
    command += ["--batch-size", "2", *given]

    def run(*more: str) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        record = json.loads((tmp_path / "two" / TRAINING_RECORD).read_text())
        assert record["result"]["evaluation"]["loss"] == pytest.approx(alone.evaluation["loss"], abs=1e-4)
        start, one, two = (
            load_file(path / WEIGHTS) for path in (made / "loftq_init", tmp_path / "one", tmp_path / "two")
        )
        for key, value in one.items():
            assert (value - two[key]).abs().mean() < 0.02 * (value - start[key]).abs().mean()
        return done.stderr

    held = re.findall(r"held (\d+) of (\d+)", run())
    assert len(held) == 8
    assert all(2 * int(part) == int(whole) for part, whole in held)

    shutil.copytree(tmp_path / "two" / "checkpoint-2", tmp_path / "checkpoint-2")
    record = json.loads((tmp_path / "two" / TRAINING_RECORD).read_text())
    shutil.rmtree(tmp_path / "two")
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "two" / "checkpoint-2")
    for key in ("result", "history", "versions"):
        del record[key]
    (tmp_path / "two" / TRAINING_RECORD).write_text(json.dumps(record))
    assert len(re.findall("held", run("--resume"))) == 4
