"""Methods by name: how scales are chosen, values rounded, factors fitted, and how many turns all that takes."""

from __future__ import annotations

from dataclasses import dataclass

SCALES = {
    "absmax": "the range of a block",
    "search": "the part of the range that leaves the least error, weighted by the inputs where they are known",
}
ROUNDINGS = {
    "nearest": "each weight for itself",
    "feedback": "later weights make up for earlier ones (GPTQ)",
    "intrinsic": "feedback into the adapter's directions too",
    "projected": "the same, for a backbone that leaves out what the adapter adds anyway, and is of no use alone",
}

SVD = {
    "krylov": "block Krylov iteration that starts from the factors before: within 0.2 % of exact",
    "exact": "a full SVD at every iteration, as published",
}


@dataclass(frozen=True)
class Method:
    """A preset. `title` is its name in texts. `iterations` counts alternations, 0 for an adapter that adds nothing, and
    `refine` counts steps of distillation.
    """

    title: str
    scales: str
    rounding: str
    metric: str
    iterations: int
    refine: int
    minimizes: str
    cost: str
    source: str

    @property
    def calibrated(self) -> bool:
        """Whether it needs text."""
        return self.needs_moment or self.refine > 0

    @property
    def needs_moment(self) -> bool:
        """Whether it must know what a layer's inputs are like."""
        return self.metric != "identity" or self.rounding != "nearest"

    @property
    def knows_adapter(self) -> bool:
        """Whether errors are fed into the directions that the adapter will correct."""
        return self.rounding in ("intrinsic", "projected")

    @property
    def projects(self) -> bool:
        """Whether the backbone leaves out what the weight has along these directions (`core.directions`)."""
        return self.rounding == "projected"

    @property
    def plain(self) -> bool:
        """Whether values go to the nearest under each block's own range."""
        return self.scales == "absmax" and self.rounding == "nearest"


METHODS = {
    "qlora": Method(
        "QLoRA",
        "absmax",
        "nearest",
        "identity",
        0,
        0,
        "nothing (B = 0)",
        "a pass over the weights",
        "arXiv 2305.14314",
    ),
    "loftq": Method(
        "LoftQ",
        "absmax",
        "nearest",
        "identity",
        5,
        0,
        "error of weights",
        "5 passes and factorizations",
        "arXiv 2310.08659",
    ),
    "qera-approx": Method(
        "QERA, approximate",
        "absmax",
        "nearest",
        "diagonal",
        1,
        0,
        "error of outputs, inputs taken as uncorrelated",
        "a factorization",
        "arXiv 2410.06040",
    ),
    "qera": Method(
        "QERA", "absmax", "nearest", "full", 1, 0, "error of outputs", "a factorization", "arXiv 2410.06040"
    ),
    "cloq": Method(
        "CLoQ",
        "absmax",
        "feedback",
        "full",
        1,
        0,
        "error of outputs, rounding too",
        "feedback, a factorization",
        "arXiv 2501.18475",
    ),
    "calibrated": Method(
        "calibrated",
        "search",
        "intrinsic",
        "full",
        3,
        64,
        "error of outputs, then KL of the model's answers",
        "feedback, 2 descents, 64 training steps",
        "ours",
    ),
}
PLAIN_START = "qlora"  # the method whose adapter adds nothing
WITHOUT_TEXT = "loftq"  # the method where nothing is known of the inputs and none is named
WITH_TEXT = "calibrated"  # the method where there is text and none is named
