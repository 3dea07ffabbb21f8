"""One name for one start. Oracle: the names that the papers give to a start without and with iterations."""

from __future__ import annotations

from typing import Any

import pytest

from loftq.errors import OptionError
from loftq.planning.method_names import title_of
from loftq.planning.recipe import recipe_again, recipe_of


def test_qlora_with_iterations_is_refused() -> None:
    with pytest.raises(OptionError, match=r"--iter 1: with --method qlora .* use --method loftq --iter 1"):
        recipe_of(method="qlora", iters=1)
    with pytest.raises(OptionError, match="--iter 3: with --method qlora"):
        recipe_of(method="qlora", iters=3, adapter="qalora")
    with pytest.raises(OptionError, match=r"--iter 0: with --method qera .* use --method qlora"):
        recipe_of(method="qera", iters=0, calibration="text.txt")


@pytest.mark.parametrize("settings", [{"method": "qlora"}, {"method": "loftq", "iters": 0}, {"iters": 0}])
@pytest.mark.parametrize("adapter", ["lora", "qalora"])
def test_no_iterations_have_one_name(settings: dict[str, Any], adapter: str) -> None:
    recipe = recipe_of(**settings, adapter=adapter)
    assert (recipe.method, recipe.iters) == ("qlora", 0)
    assert title_of(recipe.to_dict()) == ("QLoRA" if adapter == "lora" else "QA-LoRA")


def test_rounding_for_outputs_keeps_its_name() -> None:
    recipe = recipe_of(method="cloq", iters=0, calibration="text.txt")
    assert recipe.method == "cloq"
    assert title_of(recipe.to_dict()) == "CLoQ"


def test_a_manifest_of_an_earlier_version_is_read_as_what_it_is() -> None:
    written = recipe_of(method="loftq", iters=2).to_dict() | {"method": "qlora"}
    assert recipe_again(written).method == "loftq"
    assert title_of(written) == "LoftQ"
    assert title_of(recipe_of(iters=2).to_dict() | {"iters": 0}) == "QLoRA"
