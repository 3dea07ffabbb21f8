"""Patterns of skipped modules: the oracle is transformers' own `should_convert_module`."""

from __future__ import annotations

import random

from transformers.quantizers.quantizers_utils import should_convert_module

from loftq.models.skipping import Skipped

PARTS = ["model", "layers", "1", "11", "q_proj", "proj", "a", "a.b", "a_b", "fc1", "xfc1", "mlp", "gate", "gate_proj"]
EXPRESSIONS = ["layers.*", "model.(a|mlp)", "[a-m]+", "", "fc1", "mlp.gate"]


def name(draw: random.Random) -> str:
    return ".".join(draw.choices(PARTS, k=draw.randint(1, 4)))


def test_names_are_skipped_as_transformers_skips_them() -> None:
    draw = random.Random(0)
    skipped = 0
    for _ in range(300):
        patterns = [name(draw) for _ in range(draw.randint(0, 5))]
        if draw.random() < 0.3:
            patterns.append(draw.choice(EXPRESSIONS))
        ours = Skipped(patterns)
        for module in [name(draw) for _ in range(20)]:
            expected = not should_convert_module(module, patterns)
            skipped += expected
            assert ours.holds(module) == expected, (module, patterns)
    assert 500 < skipped < 5500


def test_as_many_patterns_as_modules_are_looked_up_not_compared() -> None:
    """3,000 patterns: compiled and compared one by one, they would take minutes."""
    modules = [f"model.layers.{i}.{kind}" for i in range(1000) for kind in ("k_proj", "v_proj", "o_proj")]
    ours = Skipped(modules)
    assert all(map(ours.holds, modules))
    assert not any(ours.holds(f"model.layers.{i}.q_proj") for i in range(1000))
