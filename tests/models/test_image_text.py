"""Image-text models: quantized, loaded by stock transformers and peft, and compared with the models they came from.

Covers: loftq/models/language_part.py, loftq/planning/kept_share.py.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from vision_models import IMAGE, PICOS, TASK, save_vision, vision_inputs

import loftq
from loftq.models.loading import guard_cpu
from loftq.models.tasks import TASKS, auto_class

QUICK = ("llava", "qwen2_5_vl", "mllama")
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PICOS]
OPTIONS: dict[str, Any] = {"rank": 8, "iters": 2, "alpha": 16, "quiet": True}


def load_stock(folder: Path) -> tuple[Any, Any]:
    """As the card says: the base and the peft model on it."""
    base, loading = auto_class(TASKS[TASK]).from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    guard_cpu(base)
    with warnings.catch_warnings():  # about patterns of ranks that name parameters, which peft honours all the same
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        return base, PeftModel.from_pretrained(base, folder, subfolder="loftq_init", is_trainable=True).eval()


@pytest.mark.parametrize("name", CASES)
def test_a_type(name: str, tmp_path: Path) -> None:
    """Oracles: logits of the full-precision model for texts with images, gradients of every factor, the parameters."""
    source = save_vision(name, tmp_path / "source")
    report = loftq.quantize(str(source), output=tmp_path / "out", **OPTIONS)
    assert report.task == TASK
    full = auto_class(TASKS[TASK]).from_pretrained(source, dtype=torch.bfloat16).eval()
    base, model = load_stock(report.folder)
    language = next(name for name, part in full.named_modules() if part is full.get_decoder())
    assert all(row["name"].startswith(f"{language}.") for row in report.layers)
    kept = {key: tensor for key, tensor in full.state_dict().items() if not key.startswith(f"{language}.")}
    assert any(key.endswith("weight") for key in kept)
    assert all(torch.equal(base.state_dict()[key], tensor) for key, tensor in kept.items())

    inputs = vision_inputs(name)
    with torch.no_grad():
        wanted = full(**inputs).logits.float()
        adapted = model(**inputs).logits.float()
        with model.disable_adapter():
            alone = model(**inputs).logits.float()
    before, after = (alone - wanted).norm() / wanted.norm(), (adapted - wanted).norm() / wanted.norm()
    assert after < before, (before, after)
    model.train()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= IMAGE, -100)
    model(**inputs, labels=labels).loss.backward()
    factors = {key: parameter for key, parameter in model.named_parameters() if ".lora_" in key}
    assert len(factors) == 2 * len(report.layers)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in factors.values())
    rest = sum(p.numel() for key, p in full.named_parameters() if not key.startswith((f"{language}.", "lm_head.")))
    (note,) = (note for note in report.notes if "of the weights stay in bfloat16" in note)
    listed = re.findall(r"[:,] ([^:,]+) ([\d.]+)%", note)
    said = sum(float(share) for part, share in listed if "." in part or "_" in part)
    assert said == pytest.approx(100 * rest / sum(p.numel() for p in full.parameters()), abs=0.3), note


@pytest.mark.parametrize("name", CASES)
def test_text_calibrates_the_language_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the logits for the calibration's own text, which come nearer than without it; vision linears widen."""
    monkeypatch.setattr("loftq.calibration.windows.MIN_TOKENS", 256)
    source = save_vision(name, tmp_path / "source")
    text = {"calibration": "default", "calibration_tokens": 1024, "sequence_length": 64, "refine": 0}
    plain = loftq.quantize(str(source), output=tmp_path / "plain", **OPTIONS)
    report = loftq.quantize(str(source), output=tmp_path / "out", **text, **OPTIONS)
    windows = load_file(next(tmp_path.glob("source-calibration-*")) / "teacher.safetensors")["input_ids"].long()
    full = auto_class(TASKS[TASK]).from_pretrained(source, dtype=torch.bfloat16).eval()
    errors = []
    with torch.no_grad():
        wanted = full(input_ids=windows).logits.float()
        for folder in (plain.folder, report.folder):
            model = load_stock(folder)[1]
            errors.append(float((model(input_ids=windows).logits.float() - wanted).norm() / wanted.norm()))
    assert errors[1] < errors[0], errors


@pytest.mark.parametrize("name", CASES)
def test_the_vision_tower_can_be_a_target(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the logits for texts with images. Text never reaches the tower, which is solved without."""
    monkeypatch.setattr("loftq.calibration.windows.MIN_TOKENS", 256)
    source = save_vision(name, tmp_path / "source")
    text = {"calibration": "default", "calibration_tokens": 512, "sequence_length": 64, "refine": 0}
    split = ("vision_tower.*.attn.*",) if name == "kimi_k25" else ()  # parts of one tensor, which the plan refuses
    targets: dict[str, Any] = {"target_modules": ("*",), "exclude_modules": split}
    report = loftq.quantize(str(source), output=tmp_path / "out", **targets, **text, **OPTIONS)
    full = auto_class(TASKS[TASK]).from_pretrained(source, dtype=torch.bfloat16).eval()
    language = next(name for name, part in full.named_modules() if part is full.get_decoder())
    vision = [row["name"] for row in report.layers if not row["name"].startswith(f"{language}.")]
    assert vision
    assert any("the calibration text never reached" in note and vision[0] in note for note in report.notes)
    inputs, model = vision_inputs(name), load_stock(report.folder)[1]
    with torch.no_grad():
        wanted, adapted = full(**inputs).logits.float(), model(**inputs).logits.float()
        with model.disable_adapter():
            alone = model(**inputs).logits.float()
    assert (adapted - wanted).norm() < (alone - wanted).norm()


@pytest.mark.parametrize(
    ("name", "task", "lost"),
    [("mllama", "causal-lm", ("vision", "projector")), ("llava", "feature-extraction", ("lm_head",))],
)
def test_what_another_task_leaves_out_is_said(name: str, task: str, lost: tuple[str, ...], tmp_path: Path) -> None:
    """Oracle: the tensors of the checkpoint that the class of the task has no place for."""
    source = save_vision(name, tmp_path / "source", tie_word_embeddings=False)
    tensors = load_file(source / "model.safetensors")
    report = loftq.quantize(str(source), output=tmp_path / "out", task=task, dry_run=True, **OPTIONS)
    (note,) = (note for note in report.notes if "left out" in note)
    gone = sum(tensor.numel() for key, tensor in tensors.items() if any(part in key for part in lost))
    share = gone / sum(tensor.numel() for tensor in tensors.values())
    assert lost[0] in note
    assert f"({share:.1%} of the weights; --task image-text-to-text keeps them)" in note


def test_text_refines_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the divergence that the report has, which falls, and the vision tower, which stays as it is."""
    monkeypatch.setattr("loftq.calibration.windows.MIN_TOKENS", 256)
    source = save_vision("llava", tmp_path / "source")
    text = {"calibration": "default", "calibration_tokens": 2048, "sequence_length": 64, "refine": 8, "bits": 2}
    report = loftq.quantize(str(source), output=tmp_path / "out", **text, **OPTIONS)
    assert report.totals["refine_steps"] == 8
    assert report.totals["divergence"] < report.totals["divergence_before"]
    before, after = (load_file(folder / "model.safetensors") for folder in (source, report.folder))
    tower = {key: tensor for key, tensor in before.items() if key.startswith("vision_tower.")}
    assert tower
    assert all(torch.equal(tensor, after[f"model.{key}"]) for key, tensor in tower.items())


def test_masks_that_are_made_within_vmap_do_not_end_refining(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Gemma 3's code makes them, even for text alone."""
    monkeypatch.setattr("loftq.calibration.windows.MIN_TOKENS", 256)
    text = {"calibration": "default", "calibration_tokens": 512, "sequence_length": 64, "refine": 1, "bits": 2}
    report = loftq.quantize(str(save_vision("gemma3", tmp_path / "source")), output=tmp_path / "out", **text, **OPTIONS)
    assert 0 < report.totals["divergence"] <= report.totals["divergence_before"] < 10


@pytest.mark.slow
@pytest.mark.parametrize("name", PICOS)
def test_a_folder_goes_through_the_commands(name: str, tmp_path: Path) -> None:
    """Trained on text, asked, measured and merged. Oracle: logits for images before and after the merge."""
    (tmp_path / "data.jsonl").write_text('{"prompt": "Hi?", "response": "Hello."}\n' * 4)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 8)
    folder = loftq.quantize(str(save_vision(name, tmp_path / "source")), output=tmp_path / "out", **OPTIONS).folder
    trained, options = tmp_path / "trained", {"max_steps": 1, "batch_size": 2, "quiet": True}
    loftq.train(folder, data=(str(tmp_path / "data.jsonl"),), output=trained, **options)
    assert isinstance(loftq.generate(str(trained), "Hi?", max_new_tokens=2), str)
    loftq.evaluate(str(trained), task="perplexity", data=(str(tmp_path / "text.txt"),), quiet=True)
    loftq.merge(trained, to="bf16", output=tmp_path / "merged", quiet=True)
    merged = auto_class(TASKS[TASK]).from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).eval()
    adapted = loftq.load_qlora(folder, trained, is_trainable=False).eval()
    inputs = vision_inputs(name)
    with torch.no_grad():
        wanted, found = adapted(**inputs).logits.float(), merged(**inputs).logits.float()
    assert (found - wanted).norm() < 0.05 * wanted.norm()
