"""What a run was asked to do: every setting, with its default and its bounds."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any, cast

import torch

from loftq.core.affine import ZERO_POINTS
from loftq.core.codebooks import INTEGERS, NORMAL_FLOATS
from loftq.core.grid import ROW, Grid
from loftq.core.solvers.loftq import SVD
from loftq.core.solvers.methods import METHODS, ROUNDINGS, SCALES, Method
from loftq.errors import OptionError, UnknownNameError
from loftq.formats import layouts
from loftq.formats.adapter import scaling
from loftq.models.devices import COMPUTE_DTYPES

QUANT_TYPES = {"nf": tuple(NORMAL_FLOATS.values()), "int": tuple(INTEGERS.values())}  # with their widths
BLOCK_SIZE = 64  # weights a scale, where nothing is said
TOKENS, SEQUENCE_LENGTH = 65536, 2048  # of calibration, where nothing is said
MOST_STEPS = 100_000
ADAPTERS = {
    "lora": "LoftQ: a plain LoRA that repairs the backbone",
    "qalora": "QA-LoRA: on pooled inputs, to be merged into the zero-points",
}
ALLOCATIONS = {
    "first": "4 bits for the first layers, 2 for the rest, as in the paper",
    "auto": "the widths with which the summed error is least",
}


def layer_seed(seed: int, module: str) -> int:
    """The seed of one layer: its own, whatever the order in which layers are solved."""
    digest = hashlib.sha256(f"{seed} {module}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True)
class Recipe:
    """The settings that decide the result. The same recipe on the same source gives the same bytes."""

    bits: float = 4
    allocation: str | None = None
    adapter: str = "lora"
    rank: int = 16
    pool_size: int | None = None
    method: str | None = None
    scales: str | None = None
    rounding: str | None = None
    iters: int | None = None
    refine: int | None = None
    calibration: str | None = None
    calibration_tokens: int | None = None
    sequence_length: int | None = None
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    quant_type: str | None = None
    block_size: int | None = None
    group_size: int | None = None
    zero_point: str | None = None
    double_quant: bool = False
    format: str | None = None
    compute_dtype: str = "bfloat16"
    target_modules: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] = ()
    task: str | None = None
    num_labels: int | None = None
    svd: str = "krylov"
    seed: int = 0
    max_shard_size: str = "5GB"

    def __post_init__(self) -> None:
        if self.adapter not in ADAPTERS:
            raise UnknownNameError("adapter", self.adapter, ADAPTERS)
        self._resolve_bits()
        self._resolve_grid()
        self._resolve_pool()
        self._resolve_method()
        if self.rank < 1:
            raise OptionError(f"--rank {self.rank}: expected 1 or more")
        if not 0 <= self.iterations <= 100:
            raise OptionError(f"--iter {self.iters}: expected 0 (QLoRA's start) to 100")
        if not 0 < self.lora_alpha <= 1e6:
            raise OptionError(f"--alpha {self.alpha}: expected a number above 0, at most 1000000 (default: the rank)")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"--dropout {self.dropout}: expected 0 or more, below 1")
        if not 0 <= self.seed < 2**63:
            raise OptionError(f"--seed {self.seed}: expected 0 to 2**63 - 1")
        if self.num_labels is not None and not 1 <= self.num_labels <= 1_000_000:
            raise OptionError(f"--num-labels {self.num_labels}: expected 1 or more")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise UnknownNameError("compute dtype", self.compute_dtype, COMPUTE_DTYPES)
        if self.svd not in SVD:
            raise UnknownNameError("svd", self.svd, SVD)
        layouts.choose(self.grids, self.format)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _resolve_bits(self) -> None:
        """A whole number as an int, its type, and an allocation for what is no width."""
        if float(self.bits).is_integer():
            self._set(bits=int(self.bits))
        if self.allocation is not None and self.allocation not in ALLOCATIONS:
            raise UnknownNameError("allocation", self.allocation, ALLOCATIONS)
        if self.quant_type is None:
            narrow = self.bits <= max(QUANT_TYPES["nf"]) and self.adapter == "lora"
            self._set(quant_type="nf" if narrow else "int")
        if self.quant_type not in QUANT_TYPES:
            raise UnknownNameError("quant type", str(self.quant_type), QUANT_TYPES)
        known = QUANT_TYPES["nf"] if self.allocation == "first" else QUANT_TYPES[self.quant_type]
        if not min(known) <= self.bits <= max(known):
            widths = f"known: {', '.join(map(str, known))}, and budgets between"
            raise OptionError(f"--bits {self.bits}: no {self.quant_type} type has that width ({widths})")
        if self.bits not in known and self.allocation is None:
            self._set(allocation="auto")

    def _resolve_grid(self) -> None:
        """How many weights share a scale, and where zero lies: at 8 bits, unless said otherwise, as in bitsandbytes."""
        if self.quant_type == "nf":
            for option, value in (("--group-size", self.group_size), ("--zero-point", self.zero_point)):
                if value is not None:
                    raise OptionError(f"{option} {value}: for integers; add --quant-type int (nf has --block-size)")
            self._set(block_size=BLOCK_SIZE if self.block_size is None else self.block_size)
            return
        if self.block_size is not None:
            raise OptionError(f"--block-size {self.block_size}: for nf; integers have --group-size")
        stock = self.bits == 8 and self.format in (None, "bitsandbytes") and not self.double_quant
        stock = stock and self.adapter == "lora"
        rows = stock and self.group_size in (None, ROW) and self.zero_point in (None, "symmetric")
        if self.group_size is None:
            self._set(group_size=ROW if rows else BLOCK_SIZE)
        if self.zero_point is None:
            floating = self.adapter == "qalora" and self.format != "gptq"
            self._set(zero_point="symmetric" if rows else "float" if floating else "integer")
        if self.zero_point not in ZERO_POINTS:
            raise UnknownNameError("zero-point", str(self.zero_point), ZERO_POINTS)

    def _resolve_pool(self) -> None:
        """How many inputs QA-LoRA pools: a group, unless said otherwise."""
        if self.adapter != "qalora":
            if self.pool_size is not None:
                raise OptionError(f"--pool-size {self.pool_size}: for --adapter qalora")
            return
        if self.quant_type != "int":
            raise OptionError(f"--quant-type {self.quant_type}: QA-LoRA merges into zero-points, which int alone has")
        group = cast(int, self.group_size)
        if group == ROW:
            raise OptionError(f"--group-size {ROW}: QA-LoRA pools the inputs of a group: use 32, 64 or 128")
        if self.pool_size is None:
            self._set(pool_size=group)
        if cast(int, self.pool_size) < group or cast(int, self.pool_size) % group:
            raise OptionError(f"--pool-size {self.pool_size}: expected a multiple of the group size, {group}")

    def _resolve_method(self) -> None:
        """How scales, codes and factors are found: by what the method says, where nothing else is said."""
        if self.method is None:
            self._set(method="loftq" if self.calibration is None else "calibrated")
        if self.method not in METHODS:
            raise UnknownNameError("method", str(self.method), METHODS)
        preset = METHODS[str(self.method)]
        for option, known in (("scales", SCALES), ("rounding", ROUNDINGS)):
            if getattr(self, option) is None:
                self._set(**{option: getattr(preset, option)})
            if getattr(self, option) not in known:
                raise UnknownNameError(option, str(getattr(self, option)), known)
        if self.adapter == "qalora":
            self._refuse_what_pools_leave_out(preset)
        elif self.svd == "exact" and (self.calibration is not None or not self.solving.plain):
            raise OptionError("--svd exact: for LoftQ without text: leave it out")
        self._set(iters=preset.iterations if self.iters is None else self.iters)
        self._set(refine=preset.refine if self.refine is None else self.refine)
        if not 0 <= self.refinement <= MOST_STEPS:
            raise OptionError(f"--refine {self.refine}: expected 0 (none) to {MOST_STEPS} steps")
        if self.calibration is None:
            self._refuse_without_text()
            return
        for option, usual, least in (("calibration_tokens", TOKENS, 1), ("sequence_length", SEQUENCE_LENGTH, 16)):
            if getattr(self, option) is None:
                self._set(**{option: usual})
            if getattr(self, option) < least:
                raise OptionError(f"--{option.replace('_', '-')} {getattr(self, option)}: expected {least} or more")

    def _refuse_what_pools_leave_out(self, preset: Method) -> None:
        """QA-LoRA fits scales, zero-points and pooled factors together, by a solver of its own."""
        known = [name for name, method in METHODS.items() if method.metric == "identity" or not method.plain]
        if self.method not in known:
            raise OptionError(f"--method {self.method}: QA-LoRA has {', '.join(known)}")
        for option in ("scales", "rounding"):
            value = getattr(self, option)
            if not preset.needs_moment and value != getattr(preset, option):
                raise OptionError(f"--{option} {value}: QA-LoRA without the inputs fits scales to the nearest codes")
        if self.svd == "exact":
            raise OptionError("--svd exact: QA-LoRA's pooled factors always are: leave it out")

    def _refuse_without_text(self) -> None:
        preset = METHODS[str(self.method)]
        asked = {
            "--calibration-tokens": self.calibration_tokens,
            "--sequence-length": self.sequence_length,
            "--refine": self.refinement or None,
            "--method": self.method if preset.needs_moment else None,
            "--rounding": self.rounding if self.rounding != preset.rounding else None,
        }
        for option, value in asked.items():
            if value is not None:
                raise OptionError(f"{option} {value}: needs text; add --calibration FILE, or --calibration default")

    @property
    def iterations(self) -> int:
        """Alternations: as asked, or as the method has them."""
        return cast(int, self.iters)

    @property
    def refinement(self) -> int:
        """Steps of distillation: as asked, or as the method has them."""
        return cast(int, self.refine)

    @property
    def solving(self) -> Method:
        """The method with what was said otherwise."""
        preset = METHODS[str(self.method)]
        return dataclasses.replace(preset, scales=str(self.scales), rounding=str(self.rounding))

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that layers may get, the narrowest first."""
        if self.allocation is None:
            return (int(self.bits),)
        return (2, 4) if self.allocation == "first" else QUANT_TYPES[str(self.quant_type)]

    @property
    def lora_alpha(self) -> float:
        """Alpha, which defaults to the rank: a scaling of one."""
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def scaling(self) -> float:
        """The factor before B·A with which the adapter will run."""
        return scaling(self.lora_alpha, self.rank, self.rslora)

    def grid(self, width: int) -> Grid:
        """The type of a weight of a width."""
        shared = self.group_size if self.block_size is None else self.block_size
        return Grid(f"{self.quant_type}{width}", cast(int, shared), self.double_quant, self.zero_point)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The types that layers may get, the narrowest first."""
        return tuple(self.grid(width) for width in self.widths)

    @property
    def dtype(self) -> torch.dtype:
        """In which the model computes, and in which what is not quantized is stored."""
        return COMPUTE_DTYPES[self.compute_dtype]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, alpha resolved."""
        return {**dataclasses.asdict(self), "alpha": self.lora_alpha}
