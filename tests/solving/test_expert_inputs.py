"""Moments of the inputs of fused experts. Oracle: stock transformers with hooks, and the formula in float64.

Covers: loftq/solving/expert_inputs.py, loftq/calibration/routed_tokens.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import save_mixture
from transformers import AutoModelForCausalLM

from loftq.calibration import windows
from loftq.calibration.gather import gather
from loftq.calibration.routed_tokens import PRIOR, RoutedTokens
from loftq.calibration.statistics import Statistics
from loftq.calibration.windows import prepare
from loftq.errors import ArtifactError
from loftq.hub.source import find_source
from loftq.planning.plan import Plan
from loftq.planning.planner import make_plan
from loftq.planning.recipe import recipe_of
from loftq.solving import expert_inputs
from loftq.solving.expert_inputs import ExpertInputs

CPU = torch.device("cpu")
TYPES = ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow), pytest.param("mixtral", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=TYPES)
def gathered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Statistics]:
    folder = tmp_path_factory.mktemp("routed")
    model = save_mixture(request.param, folder / "pico")
    plan = make_plan(find_source(str(model)), recipe_of(rank=4, block_size=32, expert_rank=2, calibration="default"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "MIN_TOKENS", 256)
        calibration = prepare(plan, "default", tokens=512, sequence_length=64)
        return plan, gather(plan, calibration, folder / "statistics", quiet=True)


def observed(plan: Plan, statistics: Statistics, owner: str) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The stock module in float64, its tokens as bfloat16 holds them, and the choices and weights of the router."""
    model: Any = AutoModelForCausalLM.from_pretrained(plan.source.folder, dtype=torch.float32).eval()
    calls: list[Any] = []
    model.get_submodule(owner).register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        model(input_ids=statistics.teacher()["input_ids"].long())
    tokens, experts, weights = calls[0]
    return model.get_submodule(owner).double(), tokens.bfloat16().double(), experts, weights.double()


def through(module: Any, expert: int, tokens: torch.Tensor) -> torch.Tensor:
    """The inputs of the second projection of an expert."""
    weight = module.gate_up_proj[expert]
    hidden = tokens @ (weight if module.is_transposed else weight.T)
    return module._apply_gate(hidden + module.gate_up_proj_bias[expert] if module.has_bias else hidden)


@torch.no_grad()
def test_moments_are_those_of_the_formula(gathered: tuple[Plan, Statistics], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, statistics = gathered
    monkeypatch.setattr(expert_inputs, "SAMPLE", 128)
    for layer in plan.stacks[-2:]:
        module, tokens, choices, weights = observed(plan, statistics, layer.owner)
        last = layer.module.endswith("down_proj")
        inputs = expert_inputs.expert_inputs(plan, layer, statistics, CPU)
        assert inputs is not None
        for expert in range(layer.experts):
            rows, at = torch.nonzero(choices == expert, as_tuple=True)
            x, everything = tokens[rows], tokens[::4] if last else tokens
            if last:
                x, everything = through(module, expert, x), through(module, expert, everything)
            squares = weights[rows, at] ** 2
            own = (x * squares[:, None]).T @ x / squares.sum()
            prior = PRIOR * layer.matrix[1]
            expected = (len(rows) * own + prior * everything.T @ everything / len(everything)) / (len(rows) + prior)
            torch.testing.assert_close(inputs.moment(expert).double(), expected, rtol=1e-2, atol=1e-3 * expected.max())
            assert inputs.counts[expert] == len(rows)


def test_an_expert_without_tokens_takes_those_of_its_layer(gathered: tuple[Plan, Statistics]) -> None:
    """Oracle: the mean of x xᵀ over all tokens. Choices that are left out belong to no expert."""
    plan, statistics = gathered
    layer = plan.stacks[0]
    routed = statistics.routed(layer.owner)
    assert routed is not None
    nowhere = torch.full_like(routed.experts, layer.experts)
    inputs = ExpertInputs(plan, layer, RoutedTokens(routed.tokens, nowhere, routed.weights), CPU)
    tokens = routed.tokens.double()
    assert inputs.counts == [0] * layer.experts
    torch.testing.assert_close(inputs.moment(0).double(), tokens.T @ tokens / len(tokens), rtol=1e-4, atol=1e-5)


def test_tokens_are_kept_as_they_were(tmp_path: Path) -> None:
    """Oracle: the tensors that were written. Damaged files are refused by name."""
    made = RoutedTokens.of_call(
        (torch.randn(1, 6, 8),), {"top_k_index": torch.arange(12).view(6, 2) % 4, "top_k_weights": torch.rand(6, 2)}
    )
    made.write(tmp_path / "tokens.safetensors")
    again = RoutedTokens.read(tmp_path / "tokens.safetensors", 8, "gather it again")
    assert torch.equal(again.tokens, made.tokens)
    assert torch.equal(again.experts, made.experts)
    assert torch.equal(again.weights, made.weights)
    assert made.tokens.shape == (6, 8)
    assert made.counts(4) == [3, 3, 3, 3]
    for width, damage in ((7, made), (8, RoutedTokens(made.tokens * torch.inf, made.experts, made.weights))):
        damage.write(tmp_path / "tokens.safetensors")
        with pytest.raises(ArtifactError, match=r"tokens.safetensors is damaged .*: gather it again"):
            RoutedTokens.read(tmp_path / "tokens.safetensors", width, "gather it again")
    (tmp_path / "tokens.safetensors").write_bytes(b"{}")
    with pytest.raises(ArtifactError, match="missing or damaged"):
        RoutedTokens.read(tmp_path / "tokens.safetensors", 8, "gather it again")
