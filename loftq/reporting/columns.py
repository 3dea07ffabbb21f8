"""The table of a report: what is shown of each artifact, errors first, and which of a width is the best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from loftq.display import size
from loftq.reporting.measured import OUTPUTS, WEIGHTS, Measured


class Cell(NamedTuple):
    """A figure of an artifact. `share` and `plain_share` are the lengths of its bars in per cent, None without bars."""

    text: str
    best: bool = False
    share: float | None = None
    plain_share: float | None = None
    plain: str = ""


class Column(NamedTuple):
    """A column: its name, and a cell for each artifact."""

    name: str
    cells: Sequence[Cell]


class Group(NamedTuple):
    """The artifacts of one width by their numbers, and the errors of plain rounding that they share."""

    title: str
    plain: str
    rows: Sequence[tuple[int, Measured]]


_ERROR, _FIGURE = "{:.4f}".format, "{:.4g}".format
_BARS = {"output_error": ("output_plain_error", "error of outputs"), "error": ("plain_error", "error of weights")}
_FIGURES: Sequence[tuple[str, Callable[[Measured], Any], Callable[[Any], str], bool]] = (
    ("divergence, nats per token", lambda one: one.totals.get("divergence"), _ERROR, True),
    ("perplexity, start", lambda one: one.perplexity.get("start"), _FIGURE, True),
    ("perplexity, trained", lambda one: one.perplexity.get("trained"), _FIGURE, True),
    ("bits per weight", lambda one: one.totals.get("bits_per_weight"), "{:.2f}".format, False),
    ("backbone", lambda one: one.totals.get("backbone_bytes"), size, False),
    ("adapter", lambda one: one.totals.get("adapter_bytes"), size, False),
)


def groups(artifacts: Sequence[Measured]) -> list[Group]:
    """The artifacts by width, in the order in which the widths come first."""
    found = []
    for width in dict.fromkeys(one.width for one in artifacts):
        rows = [(at, one) for at, one in enumerate(artifacts) if one.width == width]
        found.append(Group(width, _plain(one for _, one in rows), rows))
    return found


def columns(artifacts: Sequence[Measured]) -> Iterator[Column]:
    """The columns for which at least one artifact has a value."""
    for key, (plain_key, name) in _BARS.items():
        if any(key in one.totals for one in artifacts):
            yield Column(name, _bars(artifacts, key, plain_key))
    for name, value_of, form, ranked in _FIGURES:
        values = [value_of(one) for one in artifacts]
        if any(value is not None for value in values):
            best = _best(artifacts, values) if ranked else set()
            yield Column(
                name, [Cell("" if value is None else form(value), at in best) for at, value in enumerate(values)]
            )


def _bars(artifacts: Sequence[Measured], key: str, plain_key: str) -> list[Cell]:
    values = [one.totals.get(key) for one in artifacts]
    best = _best(artifacts, values)
    longest = {
        width: max(
            [max(one.totals.get(key, 0), one.totals.get(plain_key, 0)) for one in artifacts if one.width == width]
        )
        for width in {one.width for one in artifacts}
    }
    cells = []
    for at, (one, value) in enumerate(zip(artifacts, values, strict=True)):
        if value is None:
            cells.append(Cell(""))
            continue
        plain, whole = one.totals[plain_key], longest[one.width] or 1.0
        share, plain_share = (round(100 * part / whole, 1) for part in (value, plain))
        cells.append(Cell(_ERROR(value), at in best, share, plain_share, _ERROR(plain)))
    return cells


def _best(artifacts: Sequence[Measured], values: Sequence[float | None]) -> set[int]:
    """The numbers of the artifacts that have the least value of their width, where others have another value."""
    best = set()
    for width in {one.width for one in artifacts}:
        found = {at: value for at, value in enumerate(values) if value is not None and artifacts[at].width == width}
        if len(set(found.values())) > 1:
            best |= {at for at, value in found.items() if value == min(found.values())}
    return best


def _plain(artifacts: Iterator[Measured]) -> str:
    """The errors of plain rounding that all artifacts of a width have, in words."""
    found = list(artifacts)
    parts = []
    for prefix, name in ((OUTPUTS, "outputs"), (WEIGHTS, "weights")):
        values = {_ERROR(one.totals[key]) for one in found if (key := f"{prefix}plain_error") in one.totals}
        parts += [f"{name} {values.pop()}"] if len(values) == 1 else []
    return f"plain rounding: {', '.join(parts)}" if parts else ""


def conclusion(artifacts: Sequence[Measured]) -> str:
    """The report in a sentence: which artifact of each width is nearest to full precision, by what was measured."""
    value_of, words = _yardstick(artifacts)
    winners: dict[str, list[str]] = {}
    for group in groups(artifacts):
        rows = [(value, one) for _, one in group.rows if (value := value_of(one)) is not None]
        if rows:
            value, one = min(rows, key=lambda pair: pair[0])
            winners.setdefault(one.name, []).append(f"{words(one, value)} at {one.width}")
    if len(artifacts) == 1:
        (figures,) = next(iter(winners.values()))
        return f"It has {figures}."
    found = "; ".join(f"{name}, with {' and '.join(figures)}" for name, figures in winners.items())
    full = next((one.perplexity["full"] for one in artifacts if "full" in one.perplexity), None)
    ending = f"; full precision has {_FIGURE(full)}" if full is not None and "perplexity" in found else ""
    return f"Nearest to full precision: {found}{ending}."


def _yardstick(artifacts: Sequence[Measured]) -> tuple[Callable[[Measured], Any], Callable[[Measured, float], str]]:
    """What artifacts are compared by: the best measure that all of them have, and how it is told."""
    measured = [name for name in ("trained", "start") if all(name in one.perplexity for one in artifacts)]
    if measured:
        after = " after training" if measured[0] == "trained" else ""
        return lambda one: one.perplexity[measured[0]], lambda _, value: f"a perplexity{after} of {_FIGURE(value)}"
    prefix = OUTPUTS if all(one.has(OUTPUTS) for one in artifacts) else WEIGHTS
    noun = "outputs" if prefix == OUTPUTS else "weights"

    def told(one: Measured, value: float) -> str:
        plain = one.totals[f"{prefix}plain_error"]
        share = f", {value / plain:.0%} of that of plain rounding" if plain else ""
        return f"an error of {noun} of {value:.3f}{share}"

    return lambda one: one.totals.get(f"{prefix}error"), told
