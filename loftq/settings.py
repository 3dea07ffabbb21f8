"""One declaration of a setting, from which everything else that knows it is made.

A settings class is a frozen dataclass whose fields are made by `setting`. Each field holds the default, the help text,
the group under which `--help` shows it, and the values that it takes. These read the declaration:

- `check` validates a whole object: types, choices and bounds, with one wording for all of them;
- `to_dict` and `from_dict` turn it into plain values and back;
- `option_name` is its name on the command line, and `cli.options` makes the option itself;
- the reference pages are made from those options.

An option more is a field more. Rules that join several settings belong to the class that has the fields.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from loftq.errors import OptionError, UnknownNameError

GROUPS = ("model", "data", "quantization", "adapter", "calibration", "training", "evaluation", "output", "hub", "run")
_EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    tuple: "a text or a list of texts",
    dict: "a table of names and values",
}


@dataclass(frozen=True)
class Bounds:
    """The numbers that a setting takes. Those of `above` and `below` are not among them."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def hold(self, value: float) -> bool:
        """Whether a number lies within; NaN never does."""
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
            and value == value
        )

    def __str__(self) -> str:
        if self.above is not None:
            upper = f", at most {_power(self.most)}" if self.most is not None else ""
            upper = f" and below {self.below:g}" if self.below is not None else upper
            return f"a number above {self.above:g}{upper}"
        if self.below is not None:
            return f"{self.least:g} or more, below {self.below:g}"
        return f"{self.least:g} or more" if self.most is None else f"{self.least:g} to {_power(self.most)}"


@dataclass(frozen=True)
class Setting:
    """The declaration of one setting, apart from its name, its type and its default."""

    help: str
    group: str
    bounds: Bounds = Bounds()
    choices: Collection[str] = ()
    kind: str = ""  # what `choices` are called in an error: "unknown KIND"
    hint: str = ""  # follows the expected values in an error
    metavar: str | None = None
    option: str | None = None  # the option's name where it differs from the setting's
    usual: str | None = None  # the default that `--help` shows where it follows from other settings
    negative: bool = False  # a flag with --no-NAME
    repeated: bool = False  # an option that is given once for each value, instead of names with commas
    json_values: bool = False  # a table whose values are read as JSON, where they are that
    hidden: bool = False  # no option of its own


def setting(
    default: Any,
    help: str,
    group: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    **more: Any,
) -> Any:
    """A dataclass field that declares a setting; `more` are the fields of `Setting`."""
    declared = Setting(help, group, Bounds(least, above, most, below), **more)
    if default is dict:
        return field(default_factory=dict, metadata={"setting": declared})
    return field(default=default, metadata={"setting": declared})


@dataclass(frozen=True)
class Declared:
    """A setting with its name, its type without `None`, and its default."""

    name: str
    type: type
    default: Any
    setting: Setting

    @property
    def option(self) -> str:
        """Its name on the command line."""
        return self.setting.option or option_name(self.name)


def declared(settings: type) -> Mapping[str, Declared]:
    """The settings of a class by name, in the order in which they are declared."""
    kinds = typing.get_type_hints(settings)
    entries = {}
    for entry in dataclasses.fields(settings):
        if "setting" in entry.metadata:
            default = {} if entry.default is dataclasses.MISSING else entry.default
            entries[entry.name] = Declared(
                entry.name, _plain_type(kinds[entry.name]), default, entry.metadata["setting"]
            )
    return entries


def again(settings: type, name: str, default: Any = None, **changes: Any) -> Any:
    """A field that declares a setting of another class here too, with another default where one is given."""
    declaration = dataclasses.replace(declared(settings)[name].setting, **changes)
    if default is dict:
        return field(default_factory=dict, metadata={"setting": declaration})
    return field(default=default, metadata={"setting": declaration})


def option_name(name: str) -> str:
    """A setting's usual name on the command line."""
    return "--" + name.replace("_", "-")


def check(settings: Any) -> None:
    """Raise OptionError for a value of the wrong type or out of bounds, UnknownNameError for an unknown choice."""
    for entry in declared(type(settings)).values():
        value, rule = getattr(settings, entry.name), entry.setting
        if value is None:
            continue
        if not _fits(value, entry.type):
            raise OptionError(f"{entry.name} = {value!r}: expected {_EXPECTED[entry.type]}")
        if rule.choices and value not in rule.choices:
            raise UnknownNameError(rule.kind or entry.name.replace("_", " "), str(value), rule.choices)
        if rule.bounds != Bounds() and not rule.bounds.hold(value):
            hint = f" {rule.hint}" if rule.hint else ""
            raise OptionError(f"{entry.option} {value}: expected {rule.bounds}{hint}")


_Settings = TypeVar("_Settings")


def check_names(
    settings: type, names: Collection[str], elsewhere: Mapping[str, str] | None = None, also: Collection[str] = ()
) -> None:
    """Raise OptionError for a name that is not a setting.

    `elsewhere` are names that other programs use, with the settings that they mean, `also` are names to suggest.
    """
    declarations = declared(settings)
    for name in names:
        if name in declarations:
            continue
        if elsewhere and elsewhere.get(name) in declarations:
            raise OptionError(f"unknown setting {name!r}; did you mean {elsewhere[name]}?")
        raise UnknownNameError("setting", name, {*declarations, *also})


def from_dict(settings: type[_Settings], values: Mapping[str, Any]) -> _Settings:
    """An object of a settings class from names and plain values, as a file, a keyword call or a command line has them.

    Lists become tuples, one text becomes a tuple of one where several are expected, paths become texts, and 3.0 becomes
    3 where a whole number is expected. Raises OptionError for an unknown name and for a value that does not fit.
    """
    check_names(settings, values)
    entries = declared(settings)
    return settings(**{name: _converted(value, entries[name].type) for name, value in values.items()})


def split(values: Mapping[str, Any], *classes: type) -> list[dict[str, Any]]:
    """Values by the class that declares each name. Raises UnknownNameError for a name that none declares."""
    place_of = {name: place for place, settings in enumerate(classes) for name in declared(settings)}
    parts: list[dict[str, Any]] = [{} for _ in classes]
    for name, value in values.items():
        if name not in place_of:
            raise UnknownNameError("setting", name, place_of)
        parts[place_of[name]][name] = value
    return parts


def to_dict(settings: Any) -> dict[str, Any]:
    """The plain values of all settings of an object, by name."""
    return {name: getattr(settings, name) for name in declared(type(settings))}


def plain(value: Any) -> Any:
    """A value as it would be read back from JSON: tuples become lists, and keys become texts."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def said(settings: Any) -> dict[str, Any]:
    """The settings that differ from their defaults, as JSON holds them."""
    chosen = {
        name: getattr(settings, name)
        for name, entry in declared(type(settings)).items()
        if getattr(settings, name) != entry.default
    }
    return dict(plain(chosen))


def _fits(value: Any, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, (int, float))
    if kind is dict:
        return isinstance(value, Mapping)
    return isinstance(value, kind)


def _converted(value: Any, kind: type) -> Any:
    if kind is tuple and isinstance(value, (str, Path)):
        return (str(value),)
    if kind is tuple and isinstance(value, Sequence):
        return tuple(map(str, value))
    if kind is str and isinstance(value, Path):
        return str(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _plain_type(kind: Any) -> type:
    """`int` of `int | None`, `tuple` of `tuple[str, ...]`, `dict` of `Mapping[str, str]`."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(one for one in typing.get_args(kind) if one is not type(None))
    origin = typing.get_origin(kind) or kind
    plain: type = dict if issubclass(origin, Mapping) else origin
    return plain


def _power(number: float) -> str:
    """A bound as a person writes it: 2**63 - 1 rather than its digits."""
    power = (int(number) + 1).bit_length() - 1
    return f"2**{power} - 1" if number > 1e9 and int(number) + 1 == 2**power else f"{number:.15g}"
