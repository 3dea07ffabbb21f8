"""Journeys through the documentation: its commands run in their order, as they stand, on a pico model.

Nothing is substituted but the places that a reader fills in (MODEL, MODEL_DIR): the model and the data are put where
the commands look for them. Oracle: each command succeeds, and leaves what the page says.

Covers: docs/quickstart.md, docs/training.md, docs/moving-from-scripts.md, docs/comparing.md, docs/laptop.md.
"""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Result, byte_tokenizer, pico_llama

DOCS = Path(__file__).parents[1] / "docs"
Run = Callable[..., Result]


def blocks(page: str) -> list[str]:
    """The blocks of code on a page."""
    return re.findall(r"^```\w*\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(block: str) -> Iterator[list[str]]:
    """The words of the loftq commands in a block."""
    for line in block.splitlines():
        words = shlex.split(line)
        if words[:1] == ["loftq"]:
            yield words[1:]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model, under the name that the pages use, and the data."""
    monkeypatch.chdir(tmp_path)
    model = Path("meta-llama/Llama-2-7b-hf")
    pico_llama(hidden_size=512).save_pretrained(model)  # wide enough for the pooled adapter of rank 16
    byte_tokenizer().save_pretrained(model)
    chats = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]}
        for i in range(24)
    ]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats), encoding="utf-8")
    Path("pairs.csv").write_text("prompt,response\n" + "".join(f"{i}?,{i}!\n" for i in range(24)), encoding="utf-8")
    Path("heldout.txt").write_text("The quick brown fox jumps over the lazy dog. " * 6, encoding="utf-8")
    return tmp_path


def walk(run: Run, block: str, **filled: str) -> list[str]:
    """Run the commands of a block, and return what they printed."""
    printed = []
    for words in commands(block):
        ended = run(*[filled.get(word, word) for word in words])
        assert ended.exit_code == 0, (words, ended.stderr)
        printed.append(ended.stdout)
    return printed


@pytest.mark.slow
def test_tonights_fine_tune(here: Path, run: Run) -> None:
    """The first block of the quickstart, then those of the page about training."""
    quickstart, training = blocks("quickstart.md"), blocks("training.md")
    *_, trained, measured, written, merged = walk(run, quickstart[0])
    assert "Next:" in trained
    assert all(row in measured for row in ("full precision", "plain quantization", "start", "trained"))
    assert written
    assert "bf16" in merged
    assert (here / "merged" / "model.safetensors").is_file()
    walk(run, "loftq inspect trained\nloftq evaluate merged --data heldout.txt --max-windows 2")
    (here / "trained").rename(here / "earlier")
    (here / "merged").rename(here / "merged-earlier")
    walk(run, training[0], MODEL_DIR="my-model")
    walk(run, next(block for block in quickstart if "--iter 5" in block))
    recipe = next(block for block in training if "[my-run]" in block)
    (here / "runs.toml").write_text(recipe, encoding="utf-8")
    walk(run, next(block for block in training if "--recipe" in block))
    assert json.loads((here / "my-run" / "training.json").read_text())["result"]["steps"] > 0


@pytest.mark.slow
def test_moving_from_older_scripts(here: Path, run: Run) -> None:
    """The LoftQ script's command, the QLoRA script's lines, an entry of FinLoRA, and the QA-LoRA block."""
    page = blocks("moving-from-scripts.md")
    walk(run, page[0])
    lines = next(block for block in page if "# after" in block).partition("# after\n")[2]
    names: dict[str, object] = {}
    exec(lines, names)  # the two lines of the page
    assert type(names["model"]).__name__.startswith("PeftModel")
    entry = {"base_model": "meta-llama/Llama-2-7b-hf", "dataset_path": "pairs.csv", "lora_r": 8, "quant_bits": 4}
    (here / "finetune_configs.json").write_text(json.dumps({"mine": entry}), encoding="utf-8")
    walk(run, "loftq train --recipe finetune_configs.json mine")
    assert json.loads((here / "mine" / "adapter_config.json").read_text())["lora_alpha"] == 16
    walk(run, page[-1], MODEL="meta-llama/Llama-2-7b-hf")
    assert json.loads((here / "deployed" / "loftq.json").read_text())["source"]["target"] == "int"
    walk(run, 'loftq generate deployed --prompt "Why?"')
    refused = run("quantize", "meta-llama/Llama-2-7b-hf", "--method", "qlora", "--iter", 1)
    assert refused.exit_code == 2
    assert "use --method loftq --iter 1" in refused.stderr


@pytest.mark.slow
def test_a_researcher_compares_starts(here: Path, run: Run) -> None:
    """The blocks of the page about comparing: a dry run, a sweep, its recipe, its report."""
    pico_llama().save_pretrained("my-model")
    byte_tokenizer().save_pretrained("my-model")
    sweeps, recipe, reports = blocks("comparing.md")
    planned, _ = walk(run, sweeps)
    assert "18 cells in my-model-sweep" in planned
    folder = here / "my-model-sweep"
    rows = json.loads((folder / "sweep.json").read_text())["cells"]
    assert [row["status"] for row in rows] == ["complete"] * 18
    assert len({row["cell"] for row in rows if row["output_error"] and row["start_perplexity"]}) == 18
    assert len(list(folder.glob("*-calibration-*"))) == 1
    (here / "sweep.toml").write_text(recipe, encoding="utf-8")
    walk(run, "loftq sweep --recipe sweep.toml")
    assert json.loads((folder / "sweep.json").read_text())["cells"] == rows, "nothing was made again"
    page, table, two = (walk(run, line.partition(" >")[0])[0] for line in reports.splitlines())
    assert page == "report.html\n"
    assert table.count("\n") == 19
    assert [row["method"] for row in json.loads(two)["artifacts"]] == ["loftq", "calibrated"]


@pytest.mark.slow
def test_a_laptop_without_a_gpu(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of the page: quantize, generate and chat; a chat with a trained adapter's and a merged folder too."""
    (here / "HuggingFaceTB").mkdir()
    (here / "meta-llama/Llama-2-7b-hf").rename(here / "HuggingFaceTB/SmolLM2-135M-Instruct")
    first, lines = blocks("laptop.md")
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n/save talk.jsonl\n/exit\n"))
    _, written, talked = walk(run, first)
    assert written
    assert talked
    assert json.loads((here / "talk.jsonl").read_text())["messages"][0] == {"role": "user", "content": "Why?"}
    walk(run, "loftq train my-model --data chats.jsonl --output trained --max-steps 2")
    walk(run, "loftq merge trained --to bf16 --output merged")
    for name in ("my-model", "trained", "merged"):
        monkeypatch.setattr("sys.stdin", io.StringIO("Why?\nAnd then?\n"))
        assert walk(run, lines.partition(" <")[0], **{"my-model": name})[0]
