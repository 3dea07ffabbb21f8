"""Sweeps. Oracle: what the single commands write and measure with the same settings.

Covers: cli/sweep.py, loftq/reporting/sweep_record.py, loftq/training/sweep_plan.py, loftq/training/sweep_keywords.py,
loftq/training/sweep_settings.py.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import hashes

import loftq
from loftq.errors import OptionError, OutputError
from loftq.training import sweep as sweep_module

Run = Callable[..., Any]
TOO_LARGE = 65  # for layers of 64 x 64
AXES = ("--rank", f"4,{TOO_LARGE}", "--method", "qlora,loftq", "--iter", 2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "heldout.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def swept(pico: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of which half of the cells are not possible. Do not write to it."""
    folder = tmp_path_factory.mktemp("swept") / "out"
    result = loftq.sweep(
        str(pico), rank=[4, TOO_LARGE], method="qlora,loftq", iters=2, evaluate=text, output=folder, quiet=True
    )
    assert result.failed == 2
    return folder


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["cell"]: row for row in json.loads((folder / "sweep.json").read_text())["cells"]}


def test_cells_are_what_the_single_commands_make(swept: Path, pico: Path, text: Path, tmp_path: Path) -> None:
    direct = loftq.quantize(str(pico), rank=4, method="loftq", iters=2, output=tmp_path / "out", quiet=True)
    weights = {name: digest for name, digest in hashes(direct.folder).items() if name.endswith(".safetensors")}
    cell = hashes(swept / "4bit-4rank-loftq")
    assert {name: cell[name] for name in weights} == weights
    row = rows_of(swept)["4bit-4rank-loftq"]
    assert (row["weight_error"], row["status"]) == (direct.totals["error"], "complete")
    measured = loftq.evaluate(str(direct.folder), data=text, quiet=True)
    assert row["start_perplexity"] == measured.rows["start"]["perplexity"]
    full = loftq.evaluate(str(pico), data=text, quiet=True).rows["model"]["perplexity"]
    assert json.loads((swept / "sweep.json").read_text())["full_precision"] == {"perplexity": full}


def test_impossible_cells_are_recorded_and_the_others_made(swept: Path) -> None:
    rows = rows_of(swept)
    assert list(rows) == [f"4bit-{rank}rank-{method}" for rank in (4, TOO_LARGE) for method in ("qlora", "loftq")]
    for method in ("qlora", "loftq"):
        failed = rows[f"4bit-{TOO_LARGE}rank-{method}"]
        assert failed["status"] == "failed"
        assert f"--rank {TOO_LARGE} is larger" in failed["problem"]
        assert not (swept / failed["cell"]).exists()
    with (swept / "sweep.csv").open(encoding="utf-8", newline="") as file:
        table = {row["cell"]: row for row in csv.DictReader(file)}
    assert list(table) == list(rows)
    assert float(table["4bit-4rank-qlora"]["start_perplexity"]) == rows["4bit-4rank-qlora"]["start_perplexity"]
    assert table["4bit-4rank-qlora"]["run_device"]
    assert table["4bit-4rank-qlora"]["torch_version"]
    page = (swept / "report.html").read_text(encoding="utf-8")
    assert "4bit-4rank-qlora" in page
    assert f"{rows['4bit-4rank-qlora']['start_perplexity']:.4g}" in page
    assert "full precision has" in page


def test_the_same_command_makes_nothing_again_and_adds_cells(
    swept: Path, pico: Path, text: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in swept.iterdir():
        (copy / path.name).symlink_to(path) if path.is_dir() else (copy / path.name).write_bytes(path.read_bytes())
    made: list[str] = []

    def quantize(model: Any, **settings: Any) -> Any:
        made.append(Path(settings["output"]).name)
        return loftq.quantize(model, **settings)

    monkeypatch.setattr(sweep_module, "quantize", quantize)
    monkeypatch.setattr(sweep_module, "report", lambda *_arguments, **_options: [])
    command = ("sweep", pico, *AXES, "--evaluate", text, "--output", copy)
    again = run(*command)
    assert again.exit_code == 1
    assert made == [f"4bit-{TOO_LARGE}rank-qlora", f"4bit-{TOO_LARGE}rank-loftq"]  # what failed is tried again
    assert "2 of 4 cells are complete" in again.stdout
    more = run("sweep", pico, "--rank", 8, "--method", "qlora", "--iter", 2, "--evaluate", text, "--output", copy)
    assert more.exit_code == 0, more.stderr
    assert made[2:] == ["4bit-8rank-qlora"]
    assert list(rows_of(copy)) == ["4bit-4rank-qlora", "4bit-4rank-loftq", "4bit-8rank-qlora"]


def test_an_interrupted_sweep_continues_to_the_same_bytes(
    swept: Path, pico: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sweep_module.quantize

    def interrupted(model: Any, **settings: Any) -> Any:
        if "loftq" in Path(settings["output"]).name:
            raise KeyboardInterrupt
        return real(model, **settings)

    folder = tmp_path / "out"
    command = ("sweep", pico, "--rank", 4, "--method", "qlora,loftq", "--iter", 2, "--output", folder, "--quiet")
    monkeypatch.setattr(sweep_module, "report", lambda *_arguments, **_options: [])
    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "quantize", interrupted)
        stopped = run(*command)
    assert (stopped.exit_code, "run the same command again" in stopped.stderr) == (130, True)
    assert [row["status"] for row in rows_of(folder).values()] == ["complete", "begun"]
    finished = run(*command)
    assert finished.exit_code == 0, finished.stderr
    for cell in ("4bit-4rank-qlora", "4bit-4rank-loftq"):
        weights = {name: one for name, one in hashes(folder / cell).items() if name.endswith(".safetensors")}
        assert weights.items() <= hashes(swept / cell).items()


def test_other_settings_and_other_folders_are_refused(swept: Path, pico: Path, text: Path, tmp_path: Path) -> None:
    before = hashes(swept)
    with pytest.raises(OutputError, match="holds a sweep with another group_size, quant_type"):
        loftq.sweep(str(pico), quant_type="int", group_size=32, iters=2, evaluate=text, output=swept)
    with pytest.raises(OutputError, match="another evaluate"):
        loftq.sweep(str(pico), iters=2, output=swept)
    assert hashes(swept) == before
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OutputError, match="holds no sweep"):
        loftq.sweep(str(pico), output=tmp_path)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--bits", "2,two"], "--bits two: expected a number"),
        (["--rank", "0"], "--rank 0: expected 1 or more"),
        (["--rank", "8,8"], "a value is given twice"),
        (["--method", "lofq"], "did you mean loftq?"),
        (["--seeds", "-1"], "--seed -1"),
        (["--window", "64"], "--window: applies only to --evaluate"),
        (["--train", "no.toml"], "no.toml: cannot be read"),
    ],
)
def test_axes_that_cannot_be(words: list[str], problem: str, pico: Path, run: Run, tmp_path: Path) -> None:
    result = run("sweep", pico, *words, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert problem in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_recipe_file_and_a_dry_run(pico: Path, run: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "sweep.toml"
    recipe.write_text(f'model = "{pico}"\nbits = [2, 4]\nrank = 4\nmethod = ["loftq"]\noutput = "never"\n')
    result = run("sweep", "--recipe", recipe, "--rank", f"8,{TOO_LARGE}", "--dry-run", "--json")
    assert result.exit_code == 1
    planned = json.loads(result.stdout)
    assert [row["cell"] for row in planned["cells"]] == [
        f"{b}bit-{r}rank-loftq" for b in (2, 4) for r in (8, TOO_LARGE)
    ]
    direct = loftq.quantize(str(pico), bits=2, rank=8, dry_run=True).totals
    assert planned["cells"][0]["bytes"] == direct["backbone_bytes"] + direct["adapter_bytes"]
    assert "problem" in planned["cells"][1]
    assert not Path("never").exists()


def test_a_training_recipe_decides_no_cell(tmp_path: Path, pico: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    for line, problem in (('adapter = "lora"', "it has adapter lora"), ('push_to_hub = "a/b"', "it has push_to_hub")):
        recipe.write_text(f'data = "rows.jsonl"\n{line}\n')
        with pytest.raises(OptionError, match=problem):
            loftq.sweep(str(pico), train=recipe, output=tmp_path / "out")


@pytest.mark.slow
def test_cells_are_trained_and_measured_by_seeds(pico: Path, text: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i}", "response": f"it is {i}"} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.toml").write_text('data = "rows.jsonl"\nmax-steps = 2\nbatch-size = 4\nrank = 64\n')
    result = loftq.sweep(
        str(pico),
        rank=4,
        method=["loftq", "calibrated"],
        seeds=[0, 1],
        train=tmp_path / "recipe.toml",
        evaluate=text,
        calibration_tokens=4096,
        sequence_length=64,
        refine=2,
        output=tmp_path / "out",
        quiet=True,
    )
    assert result.failed == 0
    cells = rows_of(tmp_path / "out")
    assert list(cells) == [
        f"4bit-4rank-{method}{seed}" for method in ("loftq", "calibrated") for seed in ("", "-seed1")
    ]
    assert len(list((tmp_path / "out").glob("*-calibration-*"))) == 2, "statistics of each seed, once"
    cell = cells["4bit-4rank-calibrated-seed1"]
    record = json.loads((tmp_path / "out" / "4bit-4rank-calibrated-seed1-trained" / "training.json").read_text())
    assert (record["settings"]["seed"], record["result"]["train_loss"]) == (1, cell["train_loss"])
    trained = loftq.evaluate(
        str(tmp_path / "out" / cell["cell"]), adapter=tmp_path / "out" / f"{cell['cell']}-trained", data=text
    )
    assert cell["trained_perplexity"] == trained.rows["trained"]["perplexity"]
    assert cell["output_error"] < cells["4bit-4rank-loftq-seed1"]["output_error"]
