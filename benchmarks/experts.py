"""One block of experts, packed with an adapter, beside the dense block with stock peft.

    python benchmarks/experts.py [--tokens 256] [--implementation grouped_mm] [--quick] [--device cuda]

The block has the shape of Qwen3-30B-A3B's: 128 experts, 2048 x 768, 8 for each token; NF4 and NF2, rank 4, bfloat16.
Prints the bytes that the weights take, the bytes that autograd keeps for the backward pass, and the time of a forward
and a backward pass, the median of 3 (on a CPU, the processor's time), each with its ratio to the dense block. Packed
experts are computed in groups, with one grouped product for a group; with "one by one" a group is a single expert, and
with "offloaded" the codes and scales are copied from main memory. The dense block runs transformers' `grouped_mm`: its
`eager` loop over the experts did not end in time at this size. `--quick` has 16 experts of 512 x 192.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from machine import SEED, describe, seconds, table
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import loftq  # noqa: F401 (registers the wrapper of packed experts)
from loftq.core.grid import Grid
from loftq.models import expert_groups
from loftq.models.packed_experts import pack_stacks

RANK, CHOICES = 4, 8
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


class Block(nn.Module):
    """A module with experts, as a mixture has them."""

    def __init__(self, experts: int, width: int, inner: int, device: str, implementation: str = "eager") -> None:
        super().__init__()
        config = Qwen3MoeConfig(num_experts=experts, hidden_size=width, moe_intermediate_size=inner)
        config._experts_implementation = implementation
        with torch.device("meta"):
            self.experts: Any = Qwen3MoeExperts(config).bfloat16()
        self._device = device

    def dense(self) -> Block:
        """The block with random weights."""
        for name in ("gate_up_proj", "down_proj"):
            parameter = getattr(self.experts, name)
            weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device=self._device).normal_(0, 0.02)
            setattr(self.experts, name, nn.Parameter(weight, requires_grad=False))
        return self

    def packed(self, grid: Grid, place: str | None = None) -> Block:
        """The block with random codes and scales: what they are makes no difference to the time.

        With a place, they lie there, and are copied for each pass.
        """
        shapes = {f"experts.{name}": tuple(getattr(self.experts, name).shape) for name in ("gate_up_proj", "down_proj")}
        pack_stacks(self, {name: (grid, shape) for name, shape in shapes.items()}, place or self._device)
        self.experts.offloaded = place is not None
        for tensor in self.state_dict().values():
            tensor.uniform_(0.01, 0.02) if tensor.is_floating_point() else tensor.random_(0, 256)
        return self

    def forward(self, tokens: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """The experts' own forward."""
        out: torch.Tensor = self.experts(tokens, chosen, shares)
        return out


def measure(block: Block, inputs: tuple[torch.Tensor, ...]) -> tuple[int, int, float]:
    """Bytes held and kept, and seconds of a step."""
    held = sum(t.untyped_storage().nbytes() for t in [*block.parameters(), *block.buffers()])
    model = get_peft_model(block, LoraConfig(r=RANK, target_modules=[], target_parameters=TARGETS))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32) * 0.01
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    tokens, chosen, shares = inputs

    def step() -> None:
        model(tokens.requires_grad_(), chosen, shares).float().square().sum().backward()
        model.zero_grad()

    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model(tokens.requires_grad_(), chosen, shares)
    del out
    step()
    return held, sum(kept.values()), _time(step, tokens.device)


def _time(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of a step: of the processor's time on a CPU, which other programs hardly change."""
    if device.type != "cpu":
        return seconds(step, 9)
    times = []
    for _ in range(3):
        started = time.process_time()
        step()
        times.append(time.process_time() - started)
    return median(times)


def _one_by_one(block: Block) -> Block:
    expert_groups.WEIGHTS_ON_CPU = expert_groups.WEIGHTS_ON_GPU = 1
    return block


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--implementation", default="grouped_mm", help="of the dense block: grouped_mm or eager")
    options = parser.parse_args()
    experts, width, inner = (16, 512, 192) if options.quick else (128, 2048, 768)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randn(options.tokens, width, generator=generator).bfloat16()
    chosen = torch.rand(options.tokens, experts, generator=generator).topk(CHOICES).indices
    shares = torch.rand(options.tokens, CHOICES, generator=generator).softmax(-1).bfloat16()
    inputs = tuple(tensor.to(options.device) for tensor in (tokens, chosen, shares))
    builders: dict[str, Callable[[Block], Block]] = {
        "dense, stock peft": Block.dense,
        "NF4": lambda block: block.packed(Grid("nf4")),
        "NF4, offloaded": lambda block: block.packed(Grid("nf4"), "cpu"),
        "NF2": lambda block: block.packed(Grid("nf2")),
        "NF4, one by one": lambda block: _one_by_one(block.packed(Grid("nf4"))),
    }
    print(describe(options.device), end="\n\n")
    rows = [(f"{experts} experts of {width} x {inner}, {options.tokens} tokens", "held", "", "kept", "", "step", "")]
    dense: tuple[float, ...] = ()
    for name, build in builders.items():
        block = Block(experts, width, inner, options.device, options.implementation)
        found = measure(build(block), inputs)
        dense = dense or found
        shown = [f"{size / 1e6:,.0f} MB" for size in found[:2]] + [f"{found[2]:.2f} s"]
        ratios = [f"{value / first:.3f}x" for value, first in zip(found, dense, strict=True)]
        rows.append((name, *(cell for pair in zip(shown, ratios, strict=True) for cell in pair)))
        gc.collect()
    print(table(rows))


if __name__ == "__main__":
    main()
