"""Settings: one declaration makes validation, keywords and options. Oracle: the declarations, read by other means.

Covers: cli/options.py, loftq/planning/settings.py, loftq/planning/recipe.py, loftq/planning/grid_settings.py,
loftq/training/settings.py, loftq/training/train_keywords.py, loftq/training/evaluate_settings.py.
"""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass, fields
from typing import Any

import pytest

from loftq.errors import OptionError, UnknownNameError
from loftq.merging.settings import MergeKeywords, MergeRun, MergeSettings
from loftq.planning.keywords import QuantizeKeywords
from loftq.planning.recipe import Recipe, recipe_again, recipe_of
from loftq.planning.settings import QuantizeSettings, RunSettings
from loftq.settings import GROUPS, Bounds, check, declared, from_dict, said, setting, split, to_dict
from loftq.training.evaluate_settings import EvaluateKeywords, EvaluateSettings
from loftq.training.settings import TrainRun, TrainSettings
from loftq.training.train_keywords import TrainKeywords
from loftq_cli.main import cli

CLASSES = (QuantizeSettings, RunSettings, TrainSettings, TrainRun, EvaluateSettings, MergeRun, MergeSettings)
KEYWORDS = [
    (QuantizeKeywords, (QuantizeSettings, RunSettings), set()),
    (TrainKeywords, (TrainSettings, TrainRun), {"model"}),
    (EvaluateKeywords, (EvaluateSettings,), set()),
    (MergeKeywords, (MergeRun, MergeSettings), {"output"}),
]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A class with a setting of each type."""

    name: str | None = setting(None, "A name.", "model", choices=("one", "two"), kind="example")
    count: int = setting(3, "A number.", "run", least=1, most=9, hint="(or none)")
    part: float = setting(0.5, "A part.", "run", least=0, below=1)
    rate: float | None = setting(None, "A rate.", "run", above=0, below=10)
    flag: bool = setting(False, "A flag.", "run")
    words: tuple[str, ...] = setting((), "Words.", "run")
    table: typing.Mapping[str, Any] = setting(dict, "A table.", "run")

    def __post_init__(self) -> None:
        check(self)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "tow"}, r"unknown example 'tow'; did you mean two\? \(known: one, two\)"),
        ({"count": 0}, r"--count 0: expected 1 to 9 \(or none\)"),
        ({"count": 10}, "--count 10: expected 1 to 9"),
        ({"count": 1.5}, "count = 1.5: expected a whole number"),
        ({"count": True}, "count = True: expected a whole number"),
        ({"part": 1}, "--part 1: expected 0 or more, below 1"),
        ({"part": math.nan}, "--part nan: expected 0 or more, below 1"),
        ({"rate": 0}, "--rate 0: expected a number above 0 and below 10"),
        ({"flag": 1}, "flag = 1: expected true or false"),
        ({"words": 5}, "words = 5: expected a text or a list of texts"),
        ({"table": []}, r"table = \[\]: expected a table of names and values"),
        ({"nmae": "one"}, "unknown setting 'nmae'; did you mean name"),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        from_dict(Example, values)


def test_plain_values_become_an_object_and_back() -> None:
    example = from_dict(Example, {"count": 4.0, "words": ["a", "b"], "part": 0, "table": {"x": 1}})
    assert example == Example(count=4, words=("a", "b"), part=0, table={"x": 1})
    assert from_dict(Example, {"words": "a"}).words == ("a",)
    assert to_dict(example) == {entry.name: getattr(example, entry.name) for entry in fields(Example)}
    assert said(example) == {"count": 4, "words": ["a", "b"], "part": 0, "table": {"x": 1}}


def test_values_are_split_by_the_class_that_declares_them() -> None:
    assert split({"rank": 4, "quiet": True}, QuantizeSettings, RunSettings) == [{"rank": 4}, {"quiet": True}]
    with pytest.raises(UnknownNameError, match="unknown setting 'rnak'; did you mean rank"):
        split({"rnak": 4}, QuantizeSettings, RunSettings)


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        (Bounds(least=1), "1 or more"),
        (Bounds(least=0, most=2**63 - 1), r"0 to 2**63 - 1"),
        (Bounds(above=0, most=1e6), "a number above 0, at most 1000000"),
    ],
)
def test_bounds_are_written_as_a_person_would(bounds: Bounds, text: str) -> None:
    assert str(bounds) == text


@pytest.mark.parametrize("settings", CLASSES)
def test_every_setting_says_what_it_is(settings: type) -> None:
    for entry in fields(settings):
        assert "setting" in entry.metadata, f"{entry.name} is not declared by setting()"
        declaration = entry.metadata["setting"]
        assert declaration.help.endswith((".", "below."))
        assert declaration.help[0].isupper()
        assert declaration.group in GROUPS


@pytest.mark.parametrize(("keywords", "classes", "without"), KEYWORDS)
def test_keywords_are_the_settings(keywords: Any, classes: tuple[type, ...], without: set[str]) -> None:
    """The TypedDict that editors read, against the declarations."""
    names = {name for settings in classes for name in declared(settings)} - without
    assert set(typing.get_type_hints(keywords, localns={"torch": __import__("torch")})) == names


@pytest.mark.parametrize(
    ("command", "classes"),
    [
        ("quantize", (QuantizeSettings, RunSettings)),
        ("train", (TrainSettings, TrainRun)),
        ("evaluate", (EvaluateSettings,)),
    ],
)
def test_options_are_the_settings(command: str, classes: tuple[type, ...]) -> None:
    found = {name for option in cli.get_command(None, command).params for name in option.opts}  # type: ignore[union-attr, arg-type]
    wanted = {entry.option for settings in classes for entry in declared(settings).values() if not entry.setting.hidden}
    assert wanted <= found


@pytest.mark.parametrize("command", [name for name in cli.list_commands(None) if name not in ("zoo", "completion")])  # type: ignore[arg-type]
def test_every_option_has_a_help_text(command: str) -> None:
    for option in cli.get_command(None, command).params:  # type: ignore[union-attr, arg-type]
        if option.param_type_name == "option":
            assert option.help, f"loftq {command} {option.opts[0]}"  # type: ignore[attr-defined]


def test_a_recipe_has_nothing_left_open_and_knows_what_was_asked() -> None:
    asked = QuantizeSettings(bits=2.5, rank=4)
    recipe = recipe_of(bits=2.5, rank=4)
    assert recipe.requested == asked
    assert asked.method is None
    assert (recipe.method, recipe.allocation, recipe.alpha, recipe.iters) == ("loftq", "auto", 4.0, 5)
    assert recipe_again(recipe.to_dict()) == recipe


def test_a_recipe_has_a_value_for_each_setting() -> None:
    assert {entry.name for entry in fields(Recipe)} == {*declared(QuantizeSettings), "requested"}
