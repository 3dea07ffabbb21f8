"""Writes what was gathered of the inputs of layers into a folder: moments, and the tokens that reach fused experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loftq.calibration.progress import Progress
from loftq.calibration.routed_tokens import RoutedTokens
from loftq.calibration.statistics import AGAIN, read_panels
from loftq.core.moments import Moment
from loftq.errors import SourceError
from loftq.formats.disk import sync
from loftq.planning.plan import Plan

Sharing = tuple[str, ...]  # modules that get the same input


class InputFiles:
    """The files of a folder. `modules` has the file and the number of input vectors of each module.

    A module may have several inputs and share each with other modules (DeBERTa's projections of positions). Therefore
    each set of modules has its own sum, and the moment of a module is the total of all sets that contain it.
    """

    def __init__(self, folder: Path, plan: Plan, dtype: torch.dtype, progress: Progress) -> None:
        self.modules = progress.modules
        self.count = progress.files
        self._folder, self._plan, self._dtype = folder, plan, dtype

    def save(self, sums: Mapping[Sharing, Moment], routed: Mapping[str, Sequence[RoutedTokens]]) -> None:
        """Write the moments of all modules that any of the sums contains, and the tokens of experts modules."""
        for module, parts in routed.items():
            self._write_tokens(module, parts)
        sharing: dict[tuple[Any, ...], list[str]] = {}
        for module in dict.fromkeys(module for key in sums for module in key):
            earlier = self.modules.get(module, {}).get("file")  # written at an earlier visit to the block
            sets = tuple(key for key in sums for name in key if name == module)
            sharing.setdefault((earlier, sets), []).append(module)
        for (earlier, sets), modules in sharing.items():
            # A sum that other modules may need must not change; here nothing is added to it.
            unshared = len(sets) == 1 and earlier is None
            total = sums[sets[0]] if unshared else Moment(sums[sets[0]].size, sums[sets[0]].panels[0].device)
            for key in () if unshared else sets:
                total.merge(sums[key])
            if earlier is not None:
                total.merge_mean(read_panels(self._folder / earlier), self.modules[modules[0]]["count"])
            self._write(total, modules)
        for earlier in {earlier for earlier, _ in sharing if earlier is not None}:
            (self._folder / earlier).unlink()

    def _write_tokens(self, module: str, parts: Sequence[RoutedTokens]) -> None:
        earlier = self.modules.get(module, {}).get("file")
        if earlier is not None:
            width = parts[0].tokens.shape[1]
            parts = [RoutedTokens.read(self._folder / earlier, width, AGAIN), *parts]
        routed = RoutedTokens.joined(parts)
        if not routed.is_finite():
            raise self._not_finite(module)
        self.count += 1
        file = f"tokens-{self.count:05d}.safetensors"
        routed.write(self._folder / file)
        experts = next(layer.experts for layer in self._plan.stacks if layer.owner == module)
        self.modules[module] = {"file": file, "count": len(routed.tokens), "experts": routed.counts(experts)}
        if earlier is not None:
            (self._folder / earlier).unlink()

    def _write(self, total: Moment, modules: list[str]) -> None:
        panels = total.mean()
        if not all(bool(torch.isfinite(panel).all()) for panel in panels):
            raise self._not_finite(modules[0])
        self.count += 1
        file = f"moment-{self.count:05d}.safetensors"
        save_file({str(i): panel for i, panel in enumerate(panels)}, self._folder / file)
        sync(self._folder / file)  # before a record of the progress names it
        for module in modules:
            self.modules[module] = {"file": file, "count": total.count}

    def _not_finite(self, module: str) -> SourceError:
        return SourceError(f"calibration: the inputs of {module} are not finite {advice_on_dtype(self._dtype)}")


def advice_on_dtype(dtype: torch.dtype) -> str:
    """The dtype in which a model computes, and the next step if its values are not finite."""
    advice = (
        "the weights may be damaged, download them again"
        if dtype == torch.float32
        else "use --compute-dtype bfloat16, or --device cpu"
    )
    return f"in {str(dtype).removeprefix('torch.')}: {advice}"
