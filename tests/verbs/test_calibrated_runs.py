"""Calibrated runs end to end: what they report, what they leave, what they refuse.

Covers: cli/methods.py, loftq/core/solvers/methods.py, loftq/solving/distill.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, byte_tokenizer, pico_llama, save_model
from peft import PeftModel
from picos import pico_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import loftq
from loftq.calibration import forward, windows
from loftq.core.metric import damped
from loftq.core.solvers.methods import METHODS
from loftq.errors import ArtifactError, LoftQError, OutputError
from loftq.formats.artifact import MANIFEST
from loftq.hub.text import read_text
from loftq.solving.report import Report

Run = Callable[..., Result]
NEED = [name for name, method in METHODS.items() if method.calibrated]
TEXT = " ".join(read_text("default"))[:40_000]
TOKENS, LENGTH = 2048, 64


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "MIN_TOKENS", 512)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama that has something to lose."""
    return save_model(louder(pico_llama(tie_word_embeddings=False)), tmp_path_factory.mktemp("model") / "pico")


def louder(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose answers are far from even."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 6 if parameter.dim() == 2 else 1
    return model


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The calibration text as a file."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this module keep the model's statistics."""
    return tmp_path_factory.mktemp("known") / "statistics"


@pytest.fixture
def quantize(model: Path, text: Path, known: Path, tmp_path: Path) -> Callable[..., Report]:
    """Quantize the model to a folder of the test's own."""

    def call(name: str = "out", **options: Any) -> Report:
        asked: dict[str, Any] = {"rank": 4, "refine": 0, "statistics": known, "quiet": True, "calibration": text}
        asked |= {"calibration_tokens": TOKENS, "sequence_length": LENGTH, "output": tmp_path / name, **options}
        return loftq.quantize(str(model), **asked)

    return call


@torch.no_grad()
def divergence(model: Any, exact: Any, tokens: torch.Tensor) -> float:
    """KL(p ‖ q), the mean a token, over the whole vocabulary in float64."""
    p, q = (m(input_ids=tokens).logits.double().log_softmax(-1) for m in (exact, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def tokens_of(part: str) -> torch.Tensor:
    """Windows of a text, (8, LENGTH)."""
    ids = byte_tokenizer()(part, return_tensors="pt").input_ids
    return ids[0, : 8 * LENGTH].view(8, LENGTH)


@pytest.mark.parametrize("method", METHODS)
def test_errors_are_those_of_a_stock_load(method: str, quantize: Any, model: Path, known: Path) -> None:
    """Oracle: weights and outputs of the dense model that stock transformers and peft load and merge, in float64."""
    report = quantize(method=method)
    base = AutoModelForCausalLM.from_pretrained(report.folder, dtype=torch.float32).dequantize()
    merged = PeftModel.from_pretrained(base, report.folder, subfolder="loftq_init").merge_and_unload()
    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    record = json.loads((known / "calibration.json").read_text())["modules"]
    for row in report.layers:
        weight = exact.get_submodule(row["name"]).weight.detach().double()
        error = weight - merged.get_submodule(row["name"]).weight.detach().double()
        assert row["error"] == pytest.approx(float(error.norm() / weight.norm()), rel=1e-2)
        panels = load_file(known / record[row["name"]]["file"])
        moment = damped(panels["0"])  # of 64 or 128 inputs, which one panel holds
        moment = moment.triu() + moment.triu(1).T
        seen, whole = ((matrix @ moment * matrix).sum().sqrt() for matrix in (error, weight))
        assert row["output_error"] == pytest.approx(float(seen / whole), rel=1e-2)


@pytest.mark.parametrize("method", NEED)
def test_calibrated_starts_answer_more_like_the_model(method: str, quantize: Any, model: Path) -> None:
    """Oracle: plain rounding's divergence from the full-precision model, on text that was not calibrated on."""
    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    held_out = tokens_of(" ".join(read_text("default"))[60_000:62_000])
    found = {}
    for name in ("qlora", method):
        folder = quantize(name, method=name, bits=3).folder
        found[name] = divergence(loftq.load_qlora(folder, dtype=torch.float32, is_trainable=False), exact, held_out)
    assert found[method] < 0.9 * found["qlora"]


def test_refining_brings_the_answers_nearer(quantize: Any, model: Path) -> None:
    """Oracle: the whole vocabulary's divergence on held-out text; the backbone's bytes stay; the report says so."""
    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    held_out = tokens_of(" ".join(read_text("default"))[60_000:62_000])
    before, after = (quantize(name, refine=steps, bits=2) for name, steps in (("before", 0), ("after", 48)))
    found = [
        divergence(loftq.load_qlora(report.folder, dtype=torch.float32, is_trainable=False), exact, held_out)
        for report in (before, after)
    ]
    assert found[1] < 0.97 * found[0]
    assert after.totals["refine_steps"] == 48
    assert after.totals["divergence"] < 0.97 * after.totals["divergence_before"]
    assert "nats a token" in after.table()
    bytes_ = [(report.folder / "model.safetensors").read_bytes() for report in (before, after)]
    assert bytes_[0] == bytes_[1]


def test_errors_after_refining_are_those_of_the_files(quantize: Any, model: Path) -> None:
    """Oracle: the dense model that stock transformers and peft load and merge."""
    report = quantize(refine=8)
    base = AutoModelForCausalLM.from_pretrained(report.folder, dtype=torch.float32).dequantize()
    merged = PeftModel.from_pretrained(base, report.folder, subfolder="loftq_init").merge_and_unload()
    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for row in report.layers:
        weight = exact.get_submodule(row["name"]).weight.detach().double()
        error = weight - merged.get_submodule(row["name"]).weight.detach().double()
        assert row["error"] == pytest.approx(float(error.norm() / weight.norm()), rel=1e-2)
        assert row["error"] != pytest.approx(row["iterations"][row["kept_iteration"] - 1], rel=1e-6)


def test_an_adapter_that_gets_no_better_stays(quantize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the bytes of a run that does not refine."""
    monkeypatch.setattr("loftq.solving.refine._rate", lambda *_: 10.0)
    kept, plain = quantize("kept", refine=4), quantize("plain", refine=0)
    assert kept.totals["refine_steps"] == 0
    assert kept.totals["divergence"] == kept.totals["divergence_before"]
    weights = [(report.folder / "loftq_init" / "adapter_model.safetensors").read_bytes() for report in (kept, plain)]
    assert weights[0] == weights[1]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "place",
    [pytest.param("solve", marks=pytest.mark.slow), "train", pytest.param("replace", marks=pytest.mark.slow), "note"],
)
def test_a_run_that_dies_is_resumed_to_the_same_bytes(
    place: str, quantize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: an undisturbed run to the same path. It dies before the training, after it, and around its note."""
    expected = files_of(quantize(refine=3).folder)

    def die(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    where = {
        "solve": "loftq.verbs.quantize.write_configs",
        "train": "loftq.solving.distill.load_file",
        "replace": "loftq.solving.distill.open_adapter",
        "note": "loftq.verbs.quantize.write_manifest",
    }[place]
    with monkeypatch.context() as patch:
        patch.setattr(where, die)
        with pytest.raises(KeyboardInterrupt):
            quantize(refine=3, overwrite=True)
    assert files_of(quantize(refine=3, resume=True).folder) == expected


def test_a_journal_of_an_older_version_is_resumed(quantize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the distillation among the tensors. Oracle: an undisturbed run, and that no step of it is done again."""
    report = quantize(refine=3)
    expected = files_of(report.folder)

    def die(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("loftq.verbs.quantize.write_manifest", die)
        with pytest.raises(KeyboardInterrupt):
            quantize(refine=3, overwrite=True)
    journal = report.folder / ".loftq-partial" / "journal.jsonl"
    *lines, last = journal.read_text().splitlines(keepends=True)
    older = {"tensor": "(distilled)", **json.loads(last)["distilled"]}
    journal.write_text("".join([*lines, json.dumps(older) + "\n"]))
    monkeypatch.setattr("loftq.solving.distill.refine_folder", die)
    assert files_of(quantize(refine=3, resume=True).folder) == expected


def test_full_memory_says_what_lowers_the_need(quantize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator's own error, while refining."""
    monkeypatch.setattr("loftq.solving.refine._train", lambda *_: torch.empty(1 << 60, dtype=torch.uint8))
    with pytest.raises(LoftQError, match=r"out of memory: use fewer --workers; .* or --refine 0; --dry-run shows"):
        quantize(refine=4)


def test_a_finished_run_is_of_its_text(quantize: Any, text: Path, tmp_path: Path) -> None:
    """Oracle: the text under the same name; as it was, the folder is what was asked for, and changed it is not."""
    own = tmp_path / "own.txt"
    shutil.copyfile(text, own)
    made = quantize(calibration=own, statistics=None)
    assert quantize(calibration=own, statistics=None, resume=True).layers == made.layers
    own.write_text(TEXT[::-1], encoding="utf-8")
    with pytest.raises(OutputError, match=f"calibrated on another text.* than {own} is now: add --overwrite"):
        quantize(calibration=own, statistics=None, resume=True)


def test_statistics_serve_other_runs(quantize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a model that cannot be run again."""
    first = quantize("first")

    def die(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was run again")

    monkeypatch.setattr(forward, "run_in_lockstep", die)
    second = quantize("second", bits=3, rank=8)
    assert second.totals["bits_per_weight"] < first.totals["bits_per_weight"]


def test_statistics_lie_beside_the_output(model: Path, text: Path, tmp_path: Path) -> None:
    """Oracle: the folder; another sample gets another."""
    options: dict[str, Any] = {"calibration": text, "calibration_tokens": TOKENS, "sequence_length": LENGTH}
    for seed in (0, 0, 1):
        loftq.quantize(
            str(model), output=tmp_path / "out", rank=4, method="qera", seed=seed, overwrite=True, quiet=True, **options
        )
    assert len(list(tmp_path.glob("pico-calibration-*"))) == 2


def test_statistics_of_another_model_are_refused(quantize: Any, text: Path, known: Path, tmp_path: Path) -> None:
    """Oracle: the message; all shapes are the same, the weights are not. Nothing is left."""
    quantize("first")
    other = save_model(pico_llama(tie_word_embeddings=False), tmp_path / "other")
    options: dict[str, Any] = {"calibration": text, "calibration_tokens": TOKENS, "sequence_length": LENGTH}
    with pytest.raises(ArtifactError, match="was gathered with a different"):
        loftq.quantize(str(other), output=tmp_path / "second", rank=4, statistics=known, quiet=True, **options)
    assert not (tmp_path / "second" / MANIFEST).exists()


def test_a_layer_that_no_text_reaches_is_solved_without(quantize: Any, known: Path) -> None:
    """Oracle: the errors of LoftQ, which needs no text; the others are measured by their outputs."""
    without = "model.layers.1.mlp.down_proj"
    quantize("first")
    record = json.loads((known / "calibration.json").read_text())
    record["modules"][without] = {"file": None, "count": 0}
    other = Path(shutil.copytree(known, known.parent / "partial"))
    (other / "calibration.json").write_text(json.dumps(record))
    report = quantize("out", statistics=other)
    rows = {row["name"]: row for row in report.layers}
    expected = quantize(
        "loftq",
        method="loftq",
        iters=3,
        calibration=None,
        calibration_tokens=None,
        sequence_length=None,
        statistics=None,
    )
    plain = {row["name"]: row for row in expected.layers}[without]
    assert rows.pop(without)["iterations"] == plain["iterations"]
    assert all("output_error" in row for row in rows.values())


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("bert", "feature-extraction"),
        ("bert", "sequence-classification"),
        pytest.param("bart", "seq2seq-lm", marks=pytest.mark.slow),
    ],
)
def test_other_kinds_of_models(family: str, task: str, text: Path, tmp_path: Path) -> None:
    """Oracle: less divergence, of hidden states where there is no vocabulary, on text that is held out."""
    source = save_model(louder(pico_model(family, task)), tmp_path / "model")
    report = loftq.quantize(
        str(source),
        output=tmp_path / "out",
        bits=2,
        rank=4,
        calibration=text,
        calibration_tokens=4 * TOKENS,
        sequence_length=LENGTH,
        refine=12,
        quiet=True,
    )
    assert report.totals["output_error"] < 0.6 * report.totals["output_plain_error"]
    assert report.totals["divergence"] < report.totals["divergence_before"]
    loftq.load_qlora(report.folder)


def test_codes_alone_err_into_no_adapter(quantize: Any) -> None:
    """Without turns nothing corrects what rounding would leave to the adapter. Oracle: rounding with feedback alone."""
    bare, feedback = (quantize(name, iters=0, refine=0, rounding=name) for name in ("intrinsic", "feedback"))
    assert bare.totals["output_error"] == pytest.approx(feedback.totals["output_error"], rel=1e-6)
    assert bare.totals["output_error"] < bare.totals["output_plain_error"]


def test_scales_are_searched_without_text_too(quantize: Any) -> None:
    """Oracle: LoftQ under each block's own range."""
    bare = {"calibration": None, "calibration_tokens": None, "sequence_length": None, "statistics": None, "bits": 2}
    searched, plain = quantize("searched", scales="search", **bare), quantize("plain", **bare)
    assert searched.totals["error"] < 0.95 * plain.totals["error"]
    assert "output_error" not in searched.totals


def test_a_budget_is_spent_by_the_error_of_outputs(quantize: Any) -> None:
    """Oracle: other widths than those that the weights' own error gives."""
    by_outputs = quantize("outputs", bits=2.5)
    widths = {row["name"]: int(row["codebook"][2:]) for row in by_outputs.layers}
    bare = {"calibration": None, "calibration_tokens": None, "sequence_length": None, "statistics": None}
    by_weights = {row["name"]: int(row["codebook"][2:]) for row in quantize("weights", bits=2.5, **bare).layers}
    assert len(set(widths.values())) > 1
    assert widths != by_weights


@pytest.mark.parametrize("format", ["loftq", "gptq"])
def test_qalora_is_calibrated_too(format: str, quantize: Any) -> None:
    """Oracle: the same without text; then less divergence by training the pooled adapter."""
    report = quantize(adapter="qalora", group_size=16, format=format, bits=2, refine=12)
    assert report.totals["output_error"] < 0.6 * report.totals["output_plain_error"]
    assert report.totals["divergence"] < report.totals["divergence_before"]
    loftq.load_qalora(report.folder)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--method", "qera"], "--method qera: needs text: add --calibration FILE, or --calibration default"),
        (["--rounding", "feedback"], "--rounding feedback: needs text"),
        (["--refine", 10], "--refine 10: needs text"),
        (["--sequence-length", 512], "--sequence-length 512: needs text"),
        (["--method", "querra"], "unknown method 'querra'; did you mean qera?"),
        (["--scales", "absmin"], "unknown scales 'absmin'; did you mean absmax?"),
        (["--calibration", "default", "--refine", -1], "--refine -1: expected 0 to 100000 steps"),
        (["--calibration", "default", "--svd", "exact"], "--svd exact: applies only to LoftQ without text"),
        (["--adapter", "qalora", "--svd", "exact"], "--svd exact: QA-LoRA's factors are always exact"),
        (
            ["--adapter", "qalora", "--scales", "search"],
            "--scales search: without text, QA-LoRA fits the scales to the nearest codes",
        ),
        (["--adapter", "qalora", "--method", "qera"], "--method qera: QA-LoRA only has qlora, loftq, cloq, calibrated"),
        (["--calibration", "missing.txt"], "--calibration missing.txt: no such file"),
        (["--calibration", "missing.txt", "--dry-run"], "--calibration missing.txt: no such file"),
        (["--statistics", "known"], "--statistics known needs a calibration text: add --calibration FILE"),
        (["--calibration", "default", "--calibration-tokens", 100], "--calibration-tokens 100: expected 512 or more"),
        (["--calibration", "default", "--sequence-length", 4], "--sequence-length 4: expected 16 or more"),
    ],
)
def test_usage_is_checked_first(options: list[object], expected: str, run: Run, model: Path, tmp_path: Path) -> None:
    """Oracle: exit code 2, the message, and nothing written."""
    result = run("quantize", model, "--output", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert not (tmp_path / "out").exists()


def test_too_little_text_says_how_much_there_was(run: Run, model: Path, tmp_path: Path) -> None:
    """Oracle: the number of tokens, a byte each."""
    (tmp_path / "short.txt").write_text("word " * 40)
    result = run("quantize", model, "--output", tmp_path / "out", "--calibration", tmp_path / "short.txt")
    assert result.exit_code == 2
    assert "201 tokens, of which 128 fill whole windows of 128: expected 512 or more" in result.stderr


def test_a_model_without_a_tokenizer_is_refused(run: Run, text: Path, tmp_path: Path) -> None:
    """Oracle: exit code 1, and the folder's name."""
    pico_llama().save_pretrained(tmp_path / "bare")
    result = run("quantize", tmp_path / "bare", "--output", tmp_path / "out", "--calibration", text, "--rank", 4)
    assert result.exit_code == 1
    assert "has no tokenizer that can be loaded" in result.stderr


def test_methods_are_listed(run: Run) -> None:
    """Oracle: the table itself, row by row."""
    shown, rows = run("methods", "--wide").stdout, json.loads(run("methods", "--json").stdout)
    assert list(rows) == list(METHODS)
    for name, method in METHODS.items():
        assert rows[name]["rounding"] == method.rounding
        line = next(line for line in shown.splitlines() if line.startswith(f"{name} "))
        assert method.minimizes in line
        assert ("text" in line.split()) == method.calibrated
