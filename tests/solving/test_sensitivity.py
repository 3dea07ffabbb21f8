"""How much answers depend on layers, against what noise on the outputs of a layer does to them."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, save_model
from picos import pico_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from loftq.calibration.gather import calibrate
from loftq.calibration.statistics import Statistics
from loftq.hub.source import find_source
from loftq.planning.plan import Plan
from loftq.planning.planner import make_plan
from loftq.planning.recipe import recipe_of
from loftq.planning.run import start
from loftq.planning.settings import RunSettings
from loftq.solving import sensitivity
from loftq.solving.sensitivity import measure_sensitivities

EPSILON = 0.05


def planned(folder: Path, **options: Any) -> tuple[Plan, Statistics]:
    settings = {"rank": 4, "calibration": "default", "calibration_tokens": 4096, "sequence_length": 64, **options}
    recipe = recipe_of(bits=2.5, quant_type="tcq", allocation="sensitive", **settings)
    plan = make_plan(find_source(str(folder)), recipe)
    statistics = calibrate(plan, folder.parent / "out", start(RunSettings(quiet=True, device="cpu")))
    assert statistics is not None
    return plan, statistics


def change(model: nn.Module, name: str, ids: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """What a model answers with noise on the outputs of a layer, for each token a part ε of their size."""

    def disturb(module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        bias = 0.0 if module.bias is None else module.bias
        norms = (output - bias).norm(dim=-1, keepdim=True) / output.shape[-1] ** 0.5
        return output + EPSILON * norms * torch.randn(output.shape, dtype=output.dtype)

    handle = model.get_submodule(name).register_forward_hook(disturb)
    with torch.no_grad():
        changed = model(ids)[0]
    handle.remove()
    assert changed.shape == answers.shape
    return changed


def save(model: nn.Module, folder: Path) -> Path:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 3.0  # so that answers are not all alike
    byte_tokenizer().save_pretrained(save_model(model, folder))
    return folder


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_noise_changes_answers_as_much_as_is_said(name: str, tmp_path: Path) -> None:
    """Oracle: KL(p ‖ q) in float64, with noise of relative size ε: ½ ε² times the sensitivity."""
    folder = save(pico_model(name, "causal-lm").float(), tmp_path / "pico")
    plan, statistics = planned(folder)
    found = measure_sensitivities(plan, statistics, torch.device("cpu"), trust_remote_code=False, quiet=True)
    assert set(found) == {layer.module for layer in plan.linears}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = statistics.teacher()["input_ids"].long()
    with torch.no_grad():
        answers = model(ids).logits
    torch.manual_seed(0)
    for module, value in found.items():
        changed = change(model, module, ids, answers)
        log_p, log_q = answers.log_softmax(-1), changed.log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        assert 0.5 * EPSILON**2 * value == pytest.approx(float(divergence), rel=0.25), module


def test_hidden_states_of_an_encoder(tmp_path: Path) -> None:
    """Oracle: the squared change of hidden states, with noise of relative size ε: ε² times the sensitivity."""
    folder = save(pico_model("bert", "feature-extraction").float(), tmp_path / "pico")
    plan, statistics = planned(folder, task="feature-extraction")
    found = measure_sensitivities(plan, statistics, torch.device("cpu"), trust_remote_code=False, quiet=True)
    model = AutoModel.from_pretrained(folder, dtype=torch.float64)
    ids = statistics.teacher()["input_ids"].long()
    with torch.no_grad():
        answers = model(ids)[0]
    torch.manual_seed(0)
    for module, value in found.items():
        if ".pooler." in f".{module}.":  # its outputs are no hidden states
            continue
        moved = (change(model, module, ids, answers) - answers).square().sum(-1).mean()
        assert EPSILON**2 * value == pytest.approx(float(moved), rel=0.25), module


@pytest.mark.parametrize(
    ("name", "task"),
    [("deberta", "masked-lm"), ("gemma3", "image-text-to-text"), ("t5", "seq2seq-lm"), ("mixtral", "causal-lm")],
)
def test_every_layer_that_the_text_reaches(name: str, task: str, tmp_path: Path) -> None:
    """DeBERTa's code writes into outputs, Gemma 3's makes masks within vmap, and T5 has two stacks."""
    folder = save(pico_model(name, task).float(), tmp_path / "pico")
    plan, statistics = planned(folder, task=task)
    found = measure_sensitivities(plan, statistics, torch.device("cpu"), trust_remote_code=False, quiet=True)
    assert set(found) == {layer.module for layer in plan.linears}
    assert min(found.values()) > 0
    assert max(found.values()) < float("inf")


def test_nothing_of_a_window_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the collector of garbage: outputs are freed with their graph."""
    folder = save(pico_model("llama", "causal-lm").float(), tmp_path / "pico")
    plan, statistics = planned(folder)
    watch, outputs = sensitivity._watch, list[weakref.ref[torch.Tensor]]()

    def remember(*arguments: Any) -> torch.Tensor:
        output = watch(*arguments)
        outputs.append(weakref.ref(output))
        return output

    monkeypatch.setattr(sensitivity, "_watch", remember)
    gc.disable()
    try:
        measure_sensitivities(plan, statistics, torch.device("cpu"), trust_remote_code=False, quiet=True)
        assert len(outputs) == len(plan.linears) * len(statistics.teacher()["input_ids"])
        assert not any(output() is not None for output in outputs[: -len(plan.linears)])
    finally:
        gc.enable()


def test_modules_that_are_never_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have the mean sensitivity of a weight."""
    folder = save(pico_model("llama", "causal-lm").float(), tmp_path / "pico")
    plan, statistics = planned(folder)
    left_out, watch = plan.linears[0], sensitivity._watch

    def pass_over(totals: dict[str, float], name: str, module: nn.Module, args: Any, output: torch.Tensor) -> Any:
        return output if name == left_out.module else watch(totals, name, module, args, output)

    monkeypatch.setattr(sensitivity, "_watch", pass_over)
    found = measure_sensitivities(plan, statistics, torch.device("cpu"), trust_remote_code=False, quiet=True)
    others = [layer for layer in plan.linears if layer is not left_out]
    mean = sum(found[layer.module] for layer in others) / sum(layer.weights for layer in others)
    assert found[left_out.module] == pytest.approx(mean * left_out.weights)
