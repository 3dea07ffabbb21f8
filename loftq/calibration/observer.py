"""Sums up the inputs of each layer while the model runs, and keeps the tokens that reach fused experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from loftq.calibration.block_weights import BlockWeights
from loftq.calibration.progress import Progress
from loftq.calibration.routed_tokens import RoutedTokens
from loftq.calibration.statistics import AGAIN, read_panels
from loftq.core.moments import Moment
from loftq.errors import SourceError
from loftq.formats.disk import sync
from loftq.models.tasks import CAUSAL
from loftq.planning.plan import Plan

TOP = 256  # number of tokens whose log-probabilities are kept at each position
VOCABULARY = (*CAUSAL, "seq2seq-lm", "masked-lm")  # tasks whose models predict tokens


class _Input(NamedTuple):
    """An input tensor of modules, and its version, which counts the times that it was written to."""

    tensor: torch.Tensor
    version: int
    modules: list[str]


class InputObserver:
    """Sums up the inputs of the layers. It is a visitor of `lockstep.run`.

    Inputs of linears are kept until their batch has passed the block, because only then is it known which modules share
    an input. A module may have several inputs and share each with other modules (DeBERTa's projections of positions).
    Therefore each set of modules has its own sum, and the moment of a module is the total of all sets that contain it.

    The tokens of an experts module are kept until the block is left, and written as they are (`routed_tokens`).
    """

    def __init__(
        self,
        plan: Plan,
        weights: BlockWeights,
        folder: Path,
        bar: Any,
        answers: list[dict[str, torch.Tensor]],
        progress: Progress,
    ) -> None:
        self.modules = progress.modules  # the file and the number of input vectors of each
        weights.digests |= progress.digests
        self._progress = progress
        self._plan, self._weights, self._folder, self._bar, self._answers = plan, weights, folder, bar, answers
        self._inputs: dict[int, _Input] = {}
        self._sums: dict[tuple[str, ...], Moment] = {}
        self._routed: dict[str, list[RoutedTokens]] = {}
        self._files = progress.files

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record the inputs of the plan's layers while the model runs."""
        handles = [
            self._weights.model.get_submodule(layer.module).register_forward_pre_hook(
                partial(self._record_input, layer.module), with_kwargs=True
            )
            for layer in self._plan.linears
        ] + [
            self._weights.model.get_submodule(owner).register_forward_pre_hook(
                partial(self._record_tokens, owner), with_kwargs=True
            )
            for owner in dict.fromkeys(layer.owner for layer in self._plan.stacks)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record_input(self, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tensor = args[0] if args else next(iter(kwargs.values()))
        entry = self._inputs.setdefault(id(tensor), _Input(tensor, tensor._version, []))
        self._check_unchanged(entry)
        entry.modules.append(name)

    def _record_tokens(self, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._routed.setdefault(name, []).append(RoutedTokens.of_call(args, kwargs))

    def enter(self, block: str) -> None:
        self._weights.load(block)
        self._progress.begin()

    def keep(self, index: int, output: Any) -> None:
        self._progress.keep(index, output)

    def leave(self, block: str, rounds: int) -> None:
        self._weights.drop(block)
        self.save(block)
        self._progress.end(rounds, len(self._answers), self.modules, self._weights.digests, self._files)

    def passed(self, block: str | None) -> None:
        for entry in self._inputs.values():
            self._check_unchanged(entry)
            if entry.tensor.numel():
                modules, size = tuple(entry.modules), entry.tensor.shape[-1]
                self._sums.setdefault(modules, Moment(size, entry.tensor.device)).add(entry.tensor)
        self._inputs.clear()
        if block is not None or not self._weights.blocks:
            self._bar.update(1)

    def finish(self, index: int, output: Any) -> None:
        self._answers[index] = answer_of(output, self._plan.task.name in VOCABULARY)

    def save(self, block: str | None) -> None:
        """Write the moments and the tokens of a block's layers, or of all remaining layers, and free them."""
        for module in [name for name in self._routed if block is None or name.startswith(f"{block}.")]:
            self._write_tokens(module, self._routed.pop(module))
        keys = [key for key in self._sums if block is None or key[0].startswith(f"{block}.")]
        sums = {key: self._sums.pop(key) for key in keys}
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

    def _write_tokens(self, module: str, parts: list[RoutedTokens]) -> None:
        earlier = self.modules.get(module, {}).get("file")
        if earlier is not None:
            width = parts[0].tokens.shape[1]
            parts = [RoutedTokens.read(self._folder / earlier, width, AGAIN), *parts]
        routed = RoutedTokens.joined(parts)
        if not routed.is_finite():
            raise self._not_finite(module)
        self._files += 1
        file = f"tokens-{self._files:05d}.safetensors"
        routed.write(self._folder / file)
        experts = next(layer.experts for layer in self._plan.stacks if layer.owner == module)
        self.modules[module] = {"file": file, "count": len(routed.tokens), "experts": routed.counts(experts)}
        if earlier is not None:
            (self._folder / earlier).unlink()

    def _not_finite(self, module: str) -> SourceError:
        return SourceError(f"calibration: the inputs of {module} are not finite {advice_on_dtype(self._weights)}")

    def _write(self, total: Moment, modules: list[str]) -> None:
        panels = total.mean()
        if not all(bool(torch.isfinite(panel).all()) for panel in panels):
            raise self._not_finite(modules[0])
        self._files += 1
        file = f"moment-{self._files:05d}.safetensors"
        save_file({str(i): panel for i, panel in enumerate(panels)}, self._folder / file)
        sync(self._folder / file)  # before a record of the progress names it
        for module in modules:
            self.modules[module] = {"file": file, "count": total.count}

    def _check_unchanged(self, entry: _Input) -> None:
        if entry.tensor._version != entry.version:
            raise SourceError(
                f"{entry.modules[0]} cannot be calibrated, because its input is overwritten later in its block: "
                f"add --exclude-modules {entry.modules[0].rpartition('.')[2]}"
            )


def advice_on_dtype(weights: BlockWeights) -> str:
    """The dtype in which the model computes, and the next step if its values are not finite."""
    dtype = str(weights.dtype).removeprefix("torch.")
    advice = (
        "the weights may be damaged, download them again"
        if dtype == "float32"
        else "use --compute-dtype bfloat16, or --device cpu"
    )
    return f"in {dtype}: {advice}"


def answer_of(output: Any, vocabulary: bool) -> dict[str, torch.Tensor]:
    """The largest log-probabilities at each position, or else the last hidden states, on the CPU."""
    if not vocabulary:
        return {"hidden": output[0].to("cpu", torch.bfloat16)}
    logits = output.logits
    k = min(TOP, logits.shape[-1])
    values, indices = [], []
    for rows in torch.split(logits.flatten(0, 1), 512):  # the logits of a whole vocabulary in float32 are large
        rows = rows.float()
        top = rows.topk(k)
        values.append((top.values - rows.logsumexp(-1, keepdim=True)).to("cpu", torch.float16))
        indices.append(top.indices.to("cpu", torch.int32))
    shape = (*logits.shape[:2], k)
    return {"values": torch.cat(values).view(shape), "indices": torch.cat(indices).view(shape)}
