"""The pass through packed experts: what takes the place of an experts module's own `forward`.

It sorts the tokens by expert, so that each expert gets one slice of them. It unpacks one group of experts at a time
(`expert_groups`), and discards it before the next one. Autograd keeps only the tokens: the backward pass unpacks each
group once more, and computes it again, to differentiate it.

An adapter on the experts is a product of low rank that is added to the tokens,

    y = x Wᵀ + s · (x Aᵀ) Bᵀ,

and never to the weights, which would need a dense copy of all experts. It is computed in the dtype of its factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from loftq.formats.expert_factors import by_expert
from loftq.models.expert_groups import Group, Stored, grouped_product, groups_of, low_rank_product, unpack_group
from loftq.models.expert_moves import groups_at_hand
from loftq.models.expert_stacks import stack_names


class ActiveFactors(NamedTuple):
    """An active adapter on a parameter: A (rank · experts, in) and B (out, rank · experts), as peft keeps them."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the number of tokens of each expert decides which code runs
def experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The sum over the chosen experts of a token: (tokens, width) from (tokens, width), and two (tokens, k).

    It is computed in the dtype of the tokens, or in that of autocast.
    """
    kind, dtype = hidden_states.device.type, hidden_states.dtype
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    factors: list[ActiveFactors] = [
        pair for name in module.packed_stacks for pair in module.active_factors.get(name, ())
    ]
    tensors = [tensor for pair in factors for tensor in (pair.a, pair.b)]
    out: torch.Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        hidden_states.to(dtype), top_k_weights, top_k_index, module, _scalings(module), *tensors
    )
    return out.to(hidden_states.dtype)


def _scalings(module: Any) -> list[list[float]]:
    """The scalings of the active adapters of each parameter, in the order of the factors."""
    return [[pair.scaling for pair in module.active_factors.get(name, ())] for name in module.packed_stacks]


class _Experts(torch.autograd.Function):
    """The pass of a module's experts. Its backward pass differentiates one group of experts at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: torch.Tensor,
        weights: torch.Tensor,
        index: torch.Tensor,
        module: Any,
        scalings: list[list[float]],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        ctx.compute, ctx.module = _group_computer(module, scalings, tokens.dtype), module
        ctx.save_for_backward(tokens, weights, *factors)
        if tokens.is_meta:  # only the tensors that are kept matter
            return torch.empty_like(tokens)
        ctx.groups = groups_of(index, module.packed_stacks)
        total = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
        choices, flat = weights.shape[-1], weights.reshape(-1)
        pairs_by_expert = _all_by_expert(factors, module)
        with torch.autocast(tokens.device.type, enabled=False):
            for group, stored in groups_at_hand(module, ctx.groups, tokens.device):
                rows = group.pairs // choices
                own = [(group.take(a), group.take(b)) for a, b in pairs_by_expert]
                out = ctx.compute(group, stored, tokens[rows], own)
                total.index_add_(0, rows, out.float() * flat[group.pairs].unsqueeze(1).float())
        return total.to(tokens.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        tokens, weights, *factors = ctx.saved_tensors
        choices, flat = weights.shape[-1], weights.reshape(-1)
        needs_tokens, needs_weights = ctx.needs_input_grad[:2]
        pairs_by_expert = _all_by_expert(factors, ctx.module)
        token_grad = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device) if needs_tokens else None
        weight_grad = torch.zeros(flat.shape, dtype=torch.float32, device=flat.device) if needs_weights else None
        factor_grads = [torch.zeros_like(factor) for factor in factors]
        grads_by_expert = _all_by_expert(factor_grads, ctx.module)
        for group, stored in groups_at_hand(ctx.module, ctx.groups, tokens.device):
            rows = group.pairs // choices
            share = flat[group.pairs].unsqueeze(1).float()
            upstream = grad[rows].float()
            with torch.enable_grad(), torch.autocast(tokens.device.type, enabled=False):
                inputs = tokens.detach()[rows].requires_grad_(needs_tokens)
                own = [
                    (group.take(a.detach()).requires_grad_(), group.take(b.detach()).requires_grad_())
                    for a, b in pairs_by_expert
                ]
                out = ctx.compute(group, stored, inputs, own)
            if weight_grad is not None:
                weight_grad[group.pairs] = (out.detach().float() * upstream).sum(1)
            leaves = [*([inputs] if needs_tokens else []), *(factor for pair in own for factor in pair)]
            if not leaves:
                continue
            found = list(torch.autograd.grad(out, leaves, (upstream * share).to(out.dtype)))
            if token_grad is not None:
                token_grad.index_add_(0, rows, found.pop(0).float())
            for (a, b), ga, gb in zip(grads_by_expert, found[::2], found[1::2], strict=True):
                a[group.experts], b[group.experts] = ga, gb
        return (
            None if token_grad is None else token_grad.to(tokens.dtype),
            None if weight_grad is None else weight_grad.view(weights.shape).to(weights.dtype),
            None,
            None,
            None,
            *factor_grads,
        )


def _all_by_expert(factors: Sequence[torch.Tensor], module: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each adapter, all A (experts, rank, in) and all B (experts, out, rank), as views of the factors."""
    experts = next(iter(module.packed_stacks.values())).shape[0]
    return [by_expert(a, b, experts) for a, b in zip(factors[::2], factors[1::2], strict=True)]


Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
Computer = Callable[[Group, Mapping[str, Stored], torch.Tensor, Pairs], torch.Tensor]


def _group_computer(module: Any, scalings: list[list[float]], dtype: torch.dtype) -> Computer:
    """The function that computes a group of experts for its tokens, with the factors of its adapters."""
    first, last = stack_names(module)
    split_at = len(scalings[0])

    def project(
        name: str, group: Group, stored: Stored, x: torch.Tensor, pairs: Pairs, scales: list[float]
    ) -> torch.Tensor:
        out = grouped_product(x, unpack_group(module.packed_stacks[name], stored, dtype), group)
        if module.has_bias:
            bias = group.take(getattr(module, f"{name}_bias")).to(dtype)
            counts = torch.tensor(group.counts, device=bias.device)
            out = out + bias.repeat_interleave(counts, 0, output_size=len(x))
        for (a, b), scale in zip(pairs, scales, strict=True):
            out = (out + low_rank_product(x, a, b, group) * scale).to(dtype)
        return out

    def compute(group: Group, stored: Mapping[str, Stored], x: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        hidden = project(first, group, stored[first], x, pairs[:split_at], scalings[0])
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        out = project(last, group, stored[last], hidden, pairs[split_at:], scalings[1])
        return module.post_expert_norm(out) if getattr(module, "has_post_expert_norm", False) else out

    return compute
