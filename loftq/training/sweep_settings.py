"""The settings of `loftq sweep`, and the cells that they span."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from loftq.core.solvers.methods import METHODS
from loftq.errors import OptionError, UnknownNameError
from loftq.planning.settings import QuantizeSettings
from loftq.settings import again, check, option_name, setting
from loftq.training.evaluate_settings import EvaluateSettings
from loftq.training.settings import TrainSettings

AXES = ("bits", "rank", "method", "seeds")


@dataclass(frozen=True)
class Cell:
    """One point of a sweep: what is varied, and the folder that holds it."""

    bits: float
    rank: int
    method: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder. Seed 0 is not in it, so that seeds can be added to a sweep later."""
        seed = f"-seed{self.seed}" if self.seed else ""
        return f"{self.bits:g}bit-{self.rank}rank-{self.method}{seed}"

    @property
    def trained(self) -> str:
        """The name of the folder of its trained adapter."""
        return f"{self.name}-trained"


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What a sweep varies, and what it does with each cell. Raises OptionError for a value that no sweep can have."""

    bits: tuple[str, ...] = setting(
        ("4",), "Numbers of bits, such as 2,3,4.", "quantization", metavar="LIST", usual="4"
    )
    rank: tuple[str, ...] = setting(
        ("16",), "Ranks of the adapter, such as 8,16.", "adapter", metavar="LIST", usual="16"
    )
    method: tuple[str, ...] = setting(
        ("qlora", "loftq", "calibrated"),
        "Methods, such as qlora,loftq; `loftq methods` lists them.",
        "quantization",
        metavar="LIST",
        usual="qlora,loftq,calibrated",
    )
    seeds: tuple[str, ...] = setting(
        ("0",), "Seeds of quantizing and training, such as 0,1,2.", "run", metavar="LIST", usual="0"
    )
    train: str | None = setting(
        None,
        "Recipe of `loftq train` with which each cell is trained; FILE:RUN for one run of several.",
        "training",
        metavar="FILE",
    )
    evaluate: tuple[str, ...] = setting(
        (), "Text on which the perplexity of each cell is measured.", "evaluation", metavar="TEXT", repeated=True
    )
    window: int | None = again(EvaluateSettings, "window")
    stride: int | None = again(EvaluateSettings, "stride")
    max_windows: int | None = again(EvaluateSettings, "max_windows")
    dtype: str | None = again(TrainSettings, "dtype", help="Dtype in which models are trained and measured.")
    output: str | None = setting(
        None,
        "Folder to write: the cells, sweep.json, sweep.csv, report.html.",
        "output",
        metavar="DIR",
        usual="NAME-sweep",
    )
    dry_run: bool = setting(False, "Show the cells and what each needs; nothing is written.", "run")

    def __post_init__(self) -> None:
        check(self)
        for axis in AXES:
            values = getattr(self, axis)
            if not values:
                raise OptionError(f"--{axis} is empty: name one value or more, with commas between them")
            if len(set(values)) < len(values):
                raise OptionError(f"--{axis} {','.join(values)}: a value is given twice")
        for name in self.method:
            if name not in METHODS:
                raise UnknownNameError("method", name, METHODS)
        for name in ("window", "stride", "max_windows"):
            if getattr(self, name) is not None and not self.evaluate:
                raise OptionError(f"{option_name(name)}: applies only to --evaluate: name a text, or leave it out")
        list(self.cells())

    def cells(self) -> Iterator[Cell]:
        """The cells, narrow before wide."""
        axes = (
            _numbers("bits", self.bits, float),
            _numbers("rank", self.rank, int),
            self.method,
            _numbers("seeds", self.seeds, int),
        )
        for bits, rank, method, seed in product(*axes):
            yield Cell(int(bits) if bits.is_integer() else bits, rank, method, seed)

    @property
    def needs_text(self) -> bool:
        """Whether a method needs a calibration text."""
        return any(METHODS[name].calibrated for name in self.method)


def quantizing(cell: Cell, shared: Mapping[str, Any], needs_text: bool) -> dict[str, Any]:
    """The keywords of `loftq.quantize` for a cell, beside those of its run.

    All cells get the calibration text, so that the error of outputs is measured in each; the methods that need none
    are not changed by it. `iters` goes to methods that alternate, and `refine` to those that refine.
    """
    from loftq.hub.text import DEFAULT  # imports what reads data sets

    preset, options = METHODS[cell.method], dict(shared)
    if needs_text:
        options.setdefault("calibration", DEFAULT)
    if not preset.iterations:
        options.pop("iters", None)
    if not preset.refine:
        options.pop("refine", None)
    return {**options, "bits": cell.bits, "rank": cell.rank, "method": cell.method, "seed": cell.seed}


def listed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which an axis may be a single value, a text with commas, or a list."""
    return {name: _tuple(value) if name in AXES else value for name, value in values.items()}


def _tuple(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(value.replace(",", " ").split())
    return tuple(map(str, value)) if isinstance(value, Sequence) else (str(value),)


_CHECKS: Mapping[str, Any] = {
    "bits": lambda bits: QuantizeSettings(bits=bits),
    "rank": lambda rank: QuantizeSettings(rank=rank),
    "seeds": lambda seed: QuantizeSettings(seed=seed),
}


def _numbers(axis: str, values: Sequence[str], kind: type[int] | type[float]) -> list[Any]:
    numbers = []
    for value in values:
        try:
            numbers.append(kind(value))
        except ValueError as error:
            expected = "a whole number" if kind is int else "a number"
            raise OptionError(f"--{axis} {value}: expected {expected}") from error
        _CHECKS[axis](numbers[-1])
    return sorted(numbers)
