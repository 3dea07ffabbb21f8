"""Configurations of other tools: parsed as the tool parses them, and for trl run as they are.

tests/verbs/test_other_tools.py runs the other tools themselves.

Covers: cli/config.py, loftq/artifacts/tools.py.
"""

from __future__ import annotations

import ast
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Result
from safetensors.torch import load_file

import loftq
from loftq.artifacts.tools import TOOLS
from loftq.errors import ArtifactError, LoftQError, OptionError, OutputError, UnknownNameError

Run = Callable[..., Result]
CHATS = [
    {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"yes {i}"}]}
    for i in range(8)
]
PAIRS = [{"prompt": f"say {i}", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(8)]


@pytest.fixture(scope="module")
def folder(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its name needs quoting in a shell. Do not write to it."""
    output = tmp_path_factory.mktemp("config") / "my model's"
    return loftq.quantize(str(pico), output=output, rank=8, iters=1, quiet=True).folder


@pytest.fixture(scope="module")
def two_bits(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("config") / "two"
    return loftq.quantize(str(pico), output=output, bits=2, rank=8, iters=1, quiet=True).folder


def values(folder: Path, tool: str, **options: Any) -> Any:
    return yaml.safe_load(loftq.config(folder, tool, **options).text)


def test_axolotl_gets_the_folder_and_its_adapter(folder: Path) -> None:
    found = values(folder, "axolotl", data="mine.jsonl")
    assert found["base_model"] == str(folder)
    assert found["lora_model_dir"] == str(folder / "loftq_init")
    assert (found["adapter"], found["load_in_4bit"], found["lora_r"]) == ("qlora", True, 8)
    assert found["datasets"] == [{"path": "mine.jsonl", "type": "chat_template"}]
    assert isinstance(found["learning_rate"], float)


def test_a_folder_of_8_bits_is_no_qlora_for_axolotl(pico: Path, tmp_path: Path) -> None:
    made = loftq.quantize(str(pico), output=tmp_path / "eight", bits=8, rank=8, iters=1, quiet=True).folder
    found = values(made, "axolotl")
    assert (found["adapter"], found["load_in_8bit"], "load_in_4bit" in found) == ("lora", True, False)


def test_llama_factory_quantizes_nothing_and_has_its_reference(folder: Path) -> None:
    plain = values(folder, "llama-factory")
    pairs = values(folder, "llama-factory", stage="dpo")
    for found in (plain, pairs):
        assert (found["model_name_or_path"], found["adapter_name_or_path"]) == (str(folder), str(folder / "loftq_init"))
        assert "quantization_bit" not in found
    assert (pairs["ref_model"], pairs["ref_model_adapters"]) == (str(folder), str(folder / "loftq_init"))
    assert "ref_model" not in plain
    assert isinstance(pairs["learning_rate"], float)


def test_accelerate_reads_its_configuration(folder: Path, pico: Path, tmp_path: Path) -> None:
    """Oracle: accelerate's own reader, which refuses what it does not know."""
    from accelerate.commands.config.config_args import load_config_from_file

    with pytest.raises(OptionError, match="is in the format bitsandbytes: quantize with --format bitsandbytes-fsdp"):
        loftq.config(folder, "accelerate-fsdp")
    options: dict[str, Any] = {"rank": 4, "iters": 1, "format": "bitsandbytes-fsdp", "quiet": True}
    made = loftq.quantize(str(pico), output=tmp_path / "made", **options).folder
    found = load_config_from_file(str(loftq.config(made, "accelerate-fsdp", output=tmp_path / "fsdp.yaml").output))
    assert (found.distributed_type, found.fsdp_config["fsdp_version"]) == ("FSDP", 2)
    assert values(made, "axolotl")["base_model"] == str(made)
    packed = loftq.quantize(str(pico), output=tmp_path / "packed", rank=4, iters=1, bits=2, quiet=True).folder
    assert f"train {packed} --data" in loftq.config(packed, "accelerate-fsdp").text


@pytest.mark.parametrize(("stage", "references"), [("sft", 0), ("dpo", 1)])
def test_ms_swift_is_one_command(stage: str, references: int, folder: Path) -> None:
    text = loftq.config(folder, "ms-swift", stage=stage).text
    words = shlex.split(text.replace("\\\n", ""), comments=True)
    assert words[:2] == ["swift", "rlhf" if references else "sft"]
    assert words[words.index("--model") + 1] == str(folder)
    assert words[words.index("--adapters") + 1] == str(folder / "loftq_init")
    assert words.count("--ref_adapters") == references


@pytest.mark.filterwarnings("ignore")  # of trl, transformers and torch between themselves
@pytest.mark.parametrize(("stage", "rows"), [("sft", CHATS), ("dpo", PAIRS)])
def test_the_script_for_trl_trains(
    stage: str, rows: list[dict[str, Any]], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = loftq.config(folder, "trl", stage=stage, data="rows.jsonl", output="train.py").output
    assert written == Path("train.py")
    exec(compile(written.read_text(), "train.py", "exec"), {"__name__": "__main__"})
    before = load_file(folder / "loftq_init" / "adapter_model.safetensors")
    after = load_file("trained/adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(bool((after[name] != before[name]).float().mean() > 0.9) for name in before)


def test_unsloth_gets_the_adapter_which_must_name_its_backbone(folder: Path, tmp_path: Path) -> None:
    text = loftq.config(folder, "unsloth").text
    ast.parse(text)
    assert json.dumps(str(folder / "loftq_init")) in text
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    with pytest.raises(OptionError, match=r"run `loftq relocate .*moved` first"):
        loftq.config(moved, "unsloth")
    loftq.relocate(moved)
    assert str(moved / "loftq_init") in loftq.config(moved, "unsloth").text


def test_formats_of_ours_go_where_loftq_is_imported(two_bits: Path) -> None:
    ast.parse(loftq.config(two_bits, "trl").text)
    for tool in (name for name, row in TOOLS.items() if not row.imports_loftq):
        with pytest.raises(OptionError, match=rf"--for {tool}: .* is in the format loftq.*use --for trl"):
            loftq.config(two_bits, tool)


def test_output_goes_to_stdout_or_into_a_file(folder: Path, tmp_path: Path, run: Run) -> None:
    shown = run("config", folder, "--for", "axolotl")
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert "tried with axolotl 0.19.0" in shown.stdout.splitlines()[0]
    file = tmp_path / "axolotl.yaml"
    assert run("config", folder, "--for", "axolotl", "--output", file).stdout == f"{file}\n"
    assert file.read_text() == shown.stdout
    again = run("config", folder, "--for", "trl", "--output", file)
    assert again.exit_code == 1
    assert "exists already: add --overwrite" in again.stderr
    assert file.read_text() == shown.stdout
    assert run("config", folder, "--for", "trl", "--output", file, "--overwrite").exit_code == 0
    assert json.loads(run("config", folder, "--for", "trl", "--json").stdout)["text"] == file.read_text()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tool": "axolot"}, UnknownNameError, "did you mean axolotl"),
        ({"stage": "dpoo"}, UnknownNameError, "did you mean dpo"),
        ({"tool": "axolotl", "stage": "dpo"}, OptionError, "ignores lora_model_dir"),
        ({"data": ""}, OptionError, "--data"),
        ({"data": "a\nb"}, OptionError, "--data"),
        ({"output": "."}, OutputError, "name a file"),
        ({"output": "no/such/folder.py"}, OutputError, "is not a folder"),
        ({"folder": "nowhere"}, ArtifactError, "is not a folder"),
    ],
)
def test_what_gives_no_configuration_is_refused(
    options: dict[str, str], error: type[LoftQError], message: str, folder: Path
) -> None:
    with pytest.raises(error, match=message):
        loftq.config(**{"folder": folder, "tool": "trl", **options})


def test_other_folders_are_refused(pico: Path, folder: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    loftq.merge(folder, to="bf16", output=merged, check=False, quiet=True)
    with pytest.raises(ArtifactError, match="is a merged folder"):
        loftq.config(merged, "trl")
    classifier = loftq.quantize(
        str(pico), output=tmp_path / "c", task="sequence-classification", num_labels=2, rank=4, iters=1, quiet=True
    ).folder
    with pytest.raises(OptionError, match="is for sequence-classification"):
        loftq.config(classifier, "trl")
