"""Trellis codes from quantizing to merging: the theme of --quant-type tcq through the commands."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, byte_tokenizer, pico_llama, save_model
from folders import hashes
from mixtures import save_mixture
from picos import save_pico
from transformers import AutoModelForCausalLM

import loftq
from loftq.formats.artifact import open_artifact
from loftq.solving import allocate

TOKENS = torch.tensor([[11, 42, 7, 99, 3, 250, 17, 5]])
FALCON = {"hidden_size": 66, "num_attention_heads": 3, "ffn_hidden_size": 77, "alibi": False}
TEXT = {"calibration": "default", "calibration_tokens": 4096, "sequence_length": 64, "refine": 2}


def make(source: Path, out: Path, **options: Any) -> Path:
    settings: dict[str, Any] = {"bits": 2.25, "quant_type": "tcq", "rank": 4, "quiet": True, **options}
    return loftq.quantize(str(source), output=out, **settings).folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(pico_llama(), tmp_path_factory.mktemp("source") / "pico")
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def calibrated(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(source, tmp_path_factory.mktemp("calibrated") / "out", **TEXT)


def test_a_calibrated_start_through_every_verb(
    calibrated: Path, source: Path, run: Callable[..., Result], tmp_path: Path
) -> None:
    """`verify` compares errors with the source; a merge answers as the pair does; the card warns of the backbone."""
    manifest = open_artifact(calibrated).manifest
    assert manifest["format"] == "loftq-trellis"
    assert {row["codebook"] for row in manifest["layers"]} == {"tcq2.25"}
    assert manifest["recipe"]["iters"] == 1
    assert not loftq.verify(calibrated, source=source, quiet=True).problems
    card = (calibrated / "README.md").read_text()
    assert "of no use without" in card
    assert "import loftq" in card
    assert "tcq2.25" in run("inspect", calibrated).stdout
    assert run("report", calibrated, "--html", tmp_path / "report.html").exit_code == 0
    merged = loftq.merge(str(calibrated), output=tmp_path / "merged", to="bf16", quiet=True).folder
    pair, dense = loftq.load_qlora(calibrated), AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        torch.testing.assert_close(dense(TOKENS).logits.float(), pair(TOKENS).logits.float(), rtol=0.05, atol=0.05)
    again = run(*card.split("loftq quantize ")[1].split("\n")[0].split(), "--help")  # options that exist
    assert again.exit_code in (0, 2)


def test_it_starts_nearer_than_normal_float(calibrated: Path, source: Path, tmp_path: Path) -> None:
    """On the same text, rank and nearly the same bits, by the error of outputs."""
    scalar = make(source, tmp_path / "nf2", quant_type="nf", bits=2, **TEXT)
    errors = [open_artifact(folder).manifest["totals"]["output_error"] for folder in (calibrated, scalar)]
    assert errors[0] < 0.75 * errors[1]


def test_it_trains(calibrated: Path, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("the fox jumps over the lazy dog " * 60)
    result = loftq.train(
        str(calibrated), data=[str(tmp_path / "data.txt")], task="clm", output=str(tmp_path / "trained"), max_steps=8,
        cutoff_len=32, batch_size=2, learning_rate=1e-3, quiet=True, cpu=True,
    )  # fmt: skip
    assert result.steps == 8
    merged = loftq.merge(
        str(calibrated), adapter=str(tmp_path / "trained"), output=tmp_path / "m", to="bf16", quiet=True
    )
    assert merged.layers == 14


def test_a_killed_run_goes_on_to_the_same_bytes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loftq.artifacts.staging import Staging

    whole = hashes(make(source, tmp_path / "whole", workers=2))
    note, count = Staging.note, [0]

    def dying(self: Staging, *arguments: Any) -> None:
        count[0] += 1
        if count[0] > 9:
            raise KeyboardInterrupt
        note(self, *arguments)

    monkeypatch.setattr(Staging, "note", dying)
    with pytest.raises(KeyboardInterrupt):
        make(source, tmp_path / "cut", workers=1)
    monkeypatch.undo()
    rest = hashes(make(source, tmp_path / "cut", workers=1, resume=True))
    assert {name: digest for name, digest in rest.items() if name.endswith("safetensors")} == {
        name: digest for name, digest in whole.items() if name.endswith("safetensors")
    }


@pytest.mark.parametrize(("kind", "task"), [("gpt2", "causal-lm"), ("falcon", "causal-lm"), ("bart", "seq2seq-lm")])
def test_other_linears(kind: str, task: str, tmp_path: Path) -> None:
    """Transposed weights, a class of linears that stock transformers do not convert, and an encoder-decoder."""
    folder = make(save_pico(kind, task, tmp_path / "source"), tmp_path / "out", iters=0)
    assert loftq.load_qlora(folder) is not None
    assert not loftq.verify(folder, quiet=True).problems


@pytest.mark.parametrize(("kind", "options"), [("llama", {}), ("gpt2", {}), ("falcon", FALCON)])
def test_the_backbone_alone(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """With --iter 0 the calibrated backbone has all of the weight: it says nothing, and answers as the model does.

    Oracle: the model itself; the same budget coded for an adapter, without the adapter. Sides may be odd.
    """
    source = save_pico(kind, "causal-lm", tmp_path / "source", **options)
    byte_tokenizer().save_pretrained(source)
    text = {**TEXT, "refine": 0, "bits": 3}
    errors = {}
    for iters in (0, 1):
        folder = make(source, tmp_path / f"iter-{iters}", iters=iters, **text)
        assert not loftq.verify(folder, source=source, quiet=True).problems
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert config.get("needs_adapter", False) == (iters > 0)
        assert ("of no use" in (folder / "README.md").read_text()) == (iters > 0)
        alone, exact = (AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32) for place in (folder, source))
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found, expected = alone(TOKENS).logits, exact(TOKENS).logits
        assert any("of no use without" in str(each.message) for each in caught) == (iters > 0)
        errors[iters] = float((found - expected).norm() / expected.norm())
    assert errors[0] < 0.3
    assert errors[0] < errors[1]


def test_odd_sides_and_budgets(tmp_path: Path) -> None:
    """Oracle: `verify`, and the answers of the merged model. Layers share a budget, and sides are odd."""
    source = save_model(pico_llama(hidden_size=60, head_dim=10, intermediate_size=91), tmp_path / "source")
    byte_tokenizer().save_pretrained(source)
    for allocation, bits in (("auto", 2.6), ("first", 3)):
        folder = make(source, tmp_path / allocation, allocation=allocation, **{**TEXT, "bits": bits})
        rows = open_artifact(folder).manifest["layers"]
        assert len({row["codebook"] for row in rows}) > 1
        spent = sum(float(row["codebook"].removeprefix("tcq")) * row["shape"][0] * row["shape"][1] for row in rows)
        assert spent / sum(row["shape"][0] * row["shape"][1] for row in rows) <= bits
        assert not loftq.verify(folder, source=source, quiet=True).problems
        merged = loftq.merge(str(folder), output=tmp_path / f"merged-{allocation}", to="bf16", quiet=True).folder
        pair, dense = loftq.load_qlora(folder), AutoModelForCausalLM.from_pretrained(merged)
        with torch.no_grad():
            torch.testing.assert_close(dense(TOKENS).logits.float(), pair(TOKENS).logits.float(), rtol=0.1, atol=0.1)


def test_in_memory_without_an_adapter() -> None:
    """With lora=False the backbone stands alone. Oracle: the model itself."""
    exact, model = pico_llama(), loftq.quantize_model(pico_llama(), bits=3, quant_type="tcq", lora=False)
    with torch.no_grad():
        expected, found = exact(TOKENS).logits, model(TOKENS).logits  # type: ignore[operator]
    assert float((found - expected).norm() / expected.norm()) < 0.4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bits", "1"], "tcq"),
        (["--bits", "2", "--block-size", "64"], "--block-size 64"),
        (["--bits", "2", "--double-quant"], "--double-quant"),
        (["--bits", "2", "--zero-point", "float"], "--zero-point"),
        (["--bits", "2", "--method", "cloq", "--calibration", "default"], "--method cloq"),
        (["--bits", "2", "--rounding", "nearest", "--calibration", "default"], "--rounding nearest"),
        (["--bits", "2", "--adapter", "qalora"], "--quant-type tcq"),
        (["--bits", "2", "--format", "bitsandbytes"], "loftq-trellis"),
        (["--bits", "2", "--expert-bits", "1"], "--expert-bits"),
        (["--bits", "2", "--allocation", "sensitive"], "--allocation sensitive: needs text: add --calibration FILE"),
    ],
)
def test_what_does_not_apply_is_refused(
    options: list[str], said: str, source: Path, run: Callable[..., Result], tmp_path: Path
) -> None:
    result = run("quantize", source, "--quant-type", "tcq", *options, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_fused_experts_stay_for_the_reason_that_holds(run: Callable[..., Result], tmp_path: Path) -> None:
    """The note of the plan names the option that has no place for them; trellis codes have."""
    mixture = save_pico("mixtral", "causal-lm", tmp_path / "mixture")
    said = "because --format bitsandbytes has no place for them"
    for options, stays in ((("--quant-type", "tcq"), False), (("--format", "bitsandbytes"), True)):
        result = run("quantize", mixture, *options, "--rank", 4, "--dry-run")
        assert result.exit_code == 0
        assert (said in " ".join(result.stdout.split())) == stays


def test_a_mixture_from_quantizing_to_merging(tmp_path: Path) -> None:
    """Calibrated expert by expert, loaded with offload, trained and merged. Oracles: the pair beside it, its loss."""
    mixture = save_mixture("qwen3_moe", tmp_path / "mixture")
    options = {"expert_bits": 2.5, "expert_rank": 2, **TEXT}
    folder = make(mixture, tmp_path / "out", **options)
    manifest = open_artifact(folder).manifest
    assert {(len(row["shape"]), row["codebook"]) for row in manifest["layers"]} == {(2, "tcq2.25"), (3, "tcq2.5")}
    assert all("output_error" in row for row in manifest["layers"])
    assert not loftq.verify(folder, source=mixture, quiet=True).problems
    held, offloaded = (loftq.load_qlora(folder, dtype=torch.float32, offload=o) for o in (None, "experts"))
    for model in (held, offloaded):
        model(TOKENS, labels=TOKENS).loss.backward()
    for (name, one), (_, other) in zip(held.named_parameters(), offloaded.named_parameters(), strict=True):
        assert one.grad is None or torch.equal(one.grad, other.grad), name
    (tmp_path / "data.txt").write_text("the fox jumps over the lazy dog " * 60)
    trained = loftq.train(
        str(folder), data=str(tmp_path / "data.txt"), task="clm", output=tmp_path / "trained", max_steps=4,
        cutoff_len=32, batch_size=2, learning_rate=1e-2, dtype="float32", quiet=True, cpu=True,
    ).folder  # fmt: skip
    merged = loftq.merge(folder, trained, to="bf16", output=tmp_path / "merged", quiet=True).folder
    pair = loftq.load_qlora(folder, trained, dtype=torch.float32).eval()
    dense = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    losses = [model(TOKENS, labels=TOKENS).loss.item() for model in (pair, dense, held)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] != losses[2]


def test_codes_of_fewer_states(source: Path, tmp_path: Path) -> None:
    """Oracle: the errors of the report, measured again with the source; a merge answers as the pair does."""
    folder = make(source, tmp_path / "out", quant_type="tcqfast")
    assert {row["codebook"] for row in open_artifact(folder).manifest["layers"]} == {"tcqfast2.25"}
    assert not loftq.verify(folder, source=source, quiet=True).problems
    merged = loftq.merge(str(folder), output=tmp_path / "merged", to="bf16", quiet=True).folder
    pair, dense = loftq.load_qlora(folder), AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        expected, found = (model(TOKENS).logits.float() for model in (pair, dense))
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_a_budget_shared_between_layers(source: Path, tmp_path: Path) -> None:
    """With --allocation auto layers have budgets of their own; in memory the same type works."""
    folder = make(source, tmp_path / "auto", bits=2.6, allocation="auto")
    rows = open_artifact(folder).manifest["layers"]
    assert len({row["codebook"] for row in rows}) > 1
    spent = sum(float(row["codebook"].removeprefix("tcq")) * row["shape"][0] * row["shape"][1] for row in rows)
    assert spent / sum(row["shape"][0] * row["shape"][1] for row in rows) <= 2.6
    assert loftq.load_qlora(folder) is not None
    model = loftq.quantize_model(pico_llama(), bits=2, quant_type="tcq", rank=4, target_modules=["q_proj"])
    assert torch.isfinite(model(TOKENS).logits).all()  # type: ignore[operator]


def test_a_budget_shared_by_how_sensitive_layers_are(source: Path, tmp_path: Path) -> None:
    """Hundredths of a bit, at most the budget and next to it. Oracles: the errors again, a second run's bytes."""
    options = {**TEXT, "allocation": "sensitive", "statistics": tmp_path / "statistics", "refine": 0}
    folder = make(source, tmp_path / "out", **options)
    rows = open_artifact(folder).manifest["layers"]
    widths = [float(row["codebook"].removeprefix("tcq")) for row in rows]
    counts = [row["shape"][0] * row["shape"][1] for row in rows]
    assert len(set(widths)) > 7
    assert 2.24 < sum(n * b for n, b in zip(counts, widths, strict=True)) / sum(counts) <= 2.25
    assert not loftq.verify(folder, source=source, quiet=True).problems
    assert loftq.load_qlora(folder) is not None
    again = make(source, tmp_path / "again", **options, workers=3)
    assert {row["name"]: row["codebook"] for row in open_artifact(again).manifest["layers"]} == {
        row["name"]: row["codebook"] for row in rows
    }
    assert make(source, tmp_path / "out", **options, resume=True) == folder
    (kind,) = loftq.inspect(folder).types  # for a person, all widths are one type
    assert kind["type"] == f"tcq{min(widths):g} to {max(widths):g}, one scale per row"
    assert kind["bits"] == pytest.approx(2.25, abs=0.01)
    card = (folder / "README.md").read_text()
    assert f"cannot load tcq{min(widths):g} to {max(widths):g}: import" in card
    assert f"| rounding | tcq{min(widths):g} to {max(widths):g}, one scale per row |" in card
    loftq.report([folder], html=tmp_path / "report.html")
    assert "2.25 bits" in (tmp_path / "report.html").read_text()


def test_few_states_choose_the_same_widths(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are measured with 1,024 states. Oracle: the widths by errors of all 4,096."""

    def widths(name: str) -> list[float]:
        options = {**TEXT, "allocation": "sensitive", "statistics": tmp_path / "statistics", "refine": 0}
        folder = make(source, tmp_path / name, **options)
        return [float(row["codebook"].removeprefix("tcq")) for row in open_artifact(folder).manifest["layers"]]

    few = widths("few")
    monkeypatch.setattr(allocate, "_quick", lambda quantizer: quantizer)
    assert widths("all") == pytest.approx(few, abs=0.03)
