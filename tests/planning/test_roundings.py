"""Oracle: the table in docs/benchmarks.md, which says at which widths projecting is on; and the messages."""

from __future__ import annotations

from typing import Any

import pytest

from loftq.errors import OptionError
from loftq.planning.recipe import recipe_of

TEXT = {"calibration": "default"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"bits": 2}, "projected"),
        ({"bits": 3}, "intrinsic"),
        ({"bits": 3, "rounding": "projected"}, "projected"),
        ({"bits": 2.5}, "projected"),
        ({"bits": 4}, "intrinsic"),
        ({"bits": 3, "quant_type": "int"}, "intrinsic"),
        ({"bits": 4, "quant_type": "tcq"}, "projected"),
        ({"bits": 2, "quant_type": "tcq", "rounding": "intrinsic"}, "intrinsic"),
        ({"bits": 2, "quant_type": "tcq", "iters": 0}, "intrinsic"),
        ({"bits": 2, "iters": 0}, "intrinsic"),
        ({"bits": 2, "method": "cloq"}, "feedback"),
        ({"bits": 2, "adapter": "qalora"}, "intrinsic"),
        ({"bits": 4, "rounding": "projected"}, "projected"),
    ],
)
def test_the_rounding_that_is_chosen(settings: dict[str, Any], expected: str) -> None:
    recipe = recipe_of(**TEXT, **settings)  # type: ignore[arg-type]
    assert recipe.rounding == expected
    assert recipe.needs_adapter == (expected == "projected")


def test_without_text_nothing_is_left_out() -> None:
    assert not recipe_of(bits=2).needs_adapter
    assert not recipe_of(bits=2, quant_type="tcq").needs_adapter


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 4, "iters": 0}, "--iter 0"),
        ({"bits": 4, "adapter": "qalora"}, "--adapter qalora"),
        ({"bits": 2, "quant_type": "tcq", "iters": 0}, "--rounding intrinsic"),
    ],
)
def test_a_backbone_that_no_adapter_completes_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        recipe_of(**TEXT, rounding="projected", **settings)  # type: ignore[arg-type]
