"""Other training tools, run with the configuration that `loftq config` writes, on the CPU.

Each has an environment of its own, which `make tools` makes. Oracle: the adapter that the tool saves is the initial
one, changed by no more than the steps of Adam at this rate can change it. An adapter that the tool had begun anew would
be far from it, and factors in bfloat16 too. The first loss of DPO is ln 2 if the reference is the start.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import loftq

pytestmark = pytest.mark.slow
TOOLS = Path(__file__).parent.parent.parent / ".tools"
RATE, STEPS = 1e-4, 2


@pytest.fixture(scope="module")
def folder(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tools") / "my-model"
    return loftq.quantize(str(pico), output=output, rank=16, iters=2, quiet=True).folder


def run(tool: str, program: str, *words: str, cwd: Path) -> None:
    """Run a program of a tool's environment, or skip the test without one."""
    path = TOOLS / tool / "bin" / program
    if not path.exists():
        pytest.skip(f"make .tools/{tool}/installed")
    stubs = cwd / "stubs"  # LLaMA-Factory imports torchaudio, whose package is for CUDA; texts do not need it
    stubs.mkdir()
    (stubs / "torchaudio.py").touch()
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "AXOLOTL_DO_NOT_TRACK": "1", "USE_HF": "1"}
    surroundings = {**os.environ, **offline, "PYTHONPATH": str(stubs)}
    surroundings.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [path, *words],
        cwd=cwd,
        env=surroundings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def chat(number: int) -> dict[str, Any]:
    messages = [("user", f"say {number}"), ("assistant", f"yes {number}")]
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def check_adapter(folder: Path, output: Path) -> None:
    before = load_file(folder / "loftq_init" / "adapter_model.safetensors")
    saved = max(output.rglob("adapter_model.safetensors"), key=lambda path: path.stat().st_mtime)
    after = load_file(saved)
    assert after.keys() == before.keys()
    for name, value in before.items():
        change = (after[name].float() - value).abs()
        assert float(change.max()) <= 1.05 * RATE * STEPS
        assert float((change > 0).float().mean()) > 0.9


def first_loss(output: Path) -> float:
    state = max(output.rglob("trainer_state.json"), key=lambda path: path.stat().st_mtime)
    return next(float(row["loss"]) for row in json.loads(state.read_text())["log_history"] if "loss" in row)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_llama_factory(stage: str, folder: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"say {i}", "input": "", "output": f"yes {i}"} for i in range(8)]
    if stage == "dpo":
        rows = [{"instruction": f"say {i}", "input": "", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    entry: dict[str, Any] = {"file_name": "rows.json"}
    entry |= {"ranking": True, "columns": columns} if stage == "dpo" else {}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    settings = yaml.safe_load(loftq.config(folder, "llama-factory", stage=stage, data="mine").text)
    settings |= {"max_steps": STEPS, "gradient_accumulation_steps": 1, "learning_rate": RATE, "cutoff_len": 64}
    settings |= {"dataset_dir": ".", "logging_steps": 1, "report_to": "none"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    run("llama-factory", "llamafactory-cli", "train", "run.yaml", cwd=tmp_path)
    check_adapter(folder, tmp_path / "trained")
    if stage == "dpo":
        assert first_loss(tmp_path / "trained") == pytest.approx(math.log(2), abs=5e-4)


def test_axolotl(folder: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [chat(i) for i in range(8)])
    settings = yaml.safe_load(loftq.config(folder, "axolotl", data="rows.jsonl").text)
    settings |= {"max_steps": STEPS, "gradient_accumulation_steps": 1, "sequence_len": 64}
    settings |= dict.fromkeys(("bf16", "lora_qkv_kernel", "lora_mlp_kernel", "lora_o_kernel"), False)  # for GPUs
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    run("axolotl", "python", "-m", "axolotl.cli.train", "run.yaml", cwd=tmp_path)
    check_adapter(folder, tmp_path / "trained")


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_ms_swift(stage: str, folder: Path, tmp_path: Path) -> None:
    rows = [chat(i) | ({"rejected_response": f"no {i}"} if stage == "dpo" else {}) for i in range(8)]
    write_lines(tmp_path / "rows.jsonl", rows)
    text = loftq.config(folder, "ms-swift", stage=stage, data=str(tmp_path / "rows.jsonl")).text
    words = shlex.split(text.replace("\\\n", ""), comments=True)
    more = f"--use_cpu true --model_type llama --template default --max_steps {STEPS} --logging_steps 1"
    replaced = f"--gradient_accumulation_steps 1 --learning_rate {RATE} --max_length 120"
    run("ms-swift", words[0], *words[1:], *more.split(), "--report_to", "none", *replaced.split(), cwd=tmp_path)
    check_adapter(folder, tmp_path / "trained")
    if stage == "dpo":
        assert first_loss(tmp_path / "trained") == pytest.approx(math.log(2), abs=5e-4)
