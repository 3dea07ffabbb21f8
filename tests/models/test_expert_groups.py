"""Experts in groups. Oracle: the dense experts of transformers, with the product of the factors in their weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from loftq.core.grid import ROW, Grid
from loftq.models import expert_groups
from loftq.models.expert_groups import PackedStack, groups_of, runs
from loftq.models.expert_pass import ActiveFactors
from loftq.models.packed_experts import pack_stacks

EXPERTS, WIDTH, INNER, TOKENS, RANK, SCALING = 6, 64, 96, 20, 3, 2.0
CHOSEN = torch.randint(0, EXPERTS - 1, (TOKENS, 2), generator=torch.Generator().manual_seed(2))  # never the last


class Block(torch.nn.Module):
    """Packed experts with random codes and scales, and an adapter whose rank 3 is not a multiple of an alignment."""

    def __init__(self, kind: str, grid: Grid) -> None:
        super().__init__()
        if kind == "qwen3_moe":
            config: Any = Qwen3MoeConfig(num_experts=EXPERTS, hidden_size=WIDTH, moe_intermediate_size=INNER)
            kinds: Any = Qwen3MoeExperts
        else:  # transposed, with biases
            config = GptOssConfig(num_local_experts=EXPERTS, hidden_size=WIDTH, intermediate_size=INNER)
            kinds = GptOssExperts
        config._experts_implementation = "eager"
        self.dense, self.experts = kinds(config), kinds(config)
        self.shapes = {"gate_up_proj": (EXPERTS, 2 * INNER, WIDTH), "down_proj": (EXPERTS, WIDTH, INNER)}
        pack_stacks(self, {f"experts.{name}": (grid, shape) for name, shape in self.shapes.items()})
        torch.manual_seed(0)
        for name, tensor in self.experts.state_dict().items():
            if name.endswith("_widths"):
                tensor.fill_(2)
            elif tensor.dtype == torch.uint8:
                tensor.random_(0, 256)
            elif tensor.dtype == torch.int32:
                tensor.random_(-(2**31), 2**31)
            else:
                tensor.uniform_(-0.02, 0.02) if name.endswith(("bias", "shifts")) else tensor.uniform_(0.01, 0.05)

    def inputs(self) -> list[torch.Tensor]:
        """Tokens, the shares of their choices, and A and B of each parameter: all of them get gradients."""
        torch.manual_seed(1)
        tensors = [torch.randn(TOKENS, WIDTH), torch.rand(TOKENS, 2)]
        for _, rows, columns in self.shapes.values():
            tensors += [torch.randn(RANK * EXPERTS, columns) * 0.1, torch.randn(rows, RANK * EXPERTS) * 0.1]
        return [tensor.requires_grad_() for tensor in tensors]

    def forward(self, tokens: torch.Tensor, shares: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        """The pass while wrappers of peft call the module."""
        pairs = zip(self.shapes, factors[::2], factors[1::2], strict=True)
        self.experts.active_factors = {name: [ActiveFactors(a, b, SCALING)] for name, a, b in pairs}
        out: torch.Tensor = self.experts(tokens, CHOSEN, shares)
        return out

    def forward_dense(self, tokens: torch.Tensor, shares: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        """The pass of the dense class, with the products of the factors in the weights."""
        state = {name: getattr(self.experts, name) for name in self.dense.state_dict() if name.endswith("bias")}
        for name, a, b in zip(self.shapes, factors[::2], factors[1::2], strict=True):
            product = torch.bmm(b.view(-1, RANK, EXPERTS).movedim(2, 0), a.view(EXPERTS, RANK, -1))
            product = product.transpose(1, 2) if self.experts.is_transposed else product
            state[name] = self.experts.dequantize(name) + SCALING * product
        out: torch.Tensor = torch.func.functional_call(self.dense, state, (tokens, CHOSEN, shares))
        return out


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped product", "loop"])
@pytest.mark.parametrize("weights", [1, 2 * 3 * WIDTH * INNER, 1 << 24], ids=["one expert", "two experts", "all"])
@pytest.mark.parametrize(
    ("kind", "grid"),
    [
        ("qwen3_moe", Grid("nf4", 32, double_quant=True)),
        ("gpt_oss", Grid("int3", 32, zero_point="integer")),
        ("gpt_oss", Grid("tcq2.5", ROW)),
        ("gpt_oss", Grid("tcqfast2.5", ROW)),
    ],
)
def test_the_size_of_groups_and_the_product_make_no_difference(
    kind: str, grid: Grid, weights: int, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = Block(kind, grid)
    calls = []
    product = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *a, **k: calls.append(1) or product(*a, **k))
    monkeypatch.setattr(expert_groups, "WEIGHTS_ON_CPU", weights)
    if not grouped:
        monkeypatch.setattr(expert_groups, "has_grouped_products", lambda _: False)
    found, expected = block.inputs(), block.inputs()
    outputs = block(*found), block.forward_dense(*expected)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.square().sum().backward()
    for tensor, other in zip(found, expected, strict=True):
        assert tensor.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(tensor.grad, other.grad, rtol=1e-3, atol=1e-4 * float(other.grad.abs().max()))
    assert bool(calls) == (grouped and weights > 1)


def test_groups_hold_every_pair_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the choices themselves. A number that is no expert's is in no group."""
    shapes = {"up_proj": PackedStack(Grid("nf4"), (EXPERTS, 8, 64), torch.float32)}
    monkeypatch.setattr(expert_groups, "WEIGHTS_ON_CPU", 2 * 8 * 64)
    chosen = torch.tensor([[0, 3], [5, 0], [3, EXPERTS], [5, 1]])
    groups = groups_of(chosen, shapes)
    assert [group.experts for group in groups] == [[0, 1], [3, 5]]
    flat = chosen.flatten()
    for group in groups:
        ends = group.ends.tolist()
        pieces = [group.pairs[first:last] for first, last in zip([0, *ends[:-1]], ends, strict=True)]
        for expert, count, pairs in zip(group.experts, group.counts, pieces, strict=True):
            assert pairs.tolist() == (flat == expert).nonzero().flatten().tolist()
            assert count == len(pairs)
    stack = torch.arange(EXPERTS)
    assert [group.take(stack).tolist() for group in groups] == [[0, 1], [3, 5]]


@pytest.mark.parametrize(("numbers", "ranges"), [([4], [(4, 5)]), ([0, 1, 2, 5, 7, 8], [(0, 3), (5, 6), (7, 9)])])
def test_runs(numbers: list[int], ranges: list[tuple[int, int]]) -> None:
    assert list(runs(numbers)) == ranges
