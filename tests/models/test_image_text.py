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
