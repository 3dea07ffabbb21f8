"""What was tried for a calibrated start, one variant at a time: perplexity before any training, losers too.

    python benchmarks/tried.py --data FILE [MODEL] [--variants ...] [--kind nf4] [--rank 16] [--refine STEPS]
                                [--tokens 65536]

Everything is in memory and in float32, on the texts of `benchmarks/calibrated.py`: 65,536 tokens of FILE's first half
to calibrate on (8,192 for gradients), 24 windows of 512 tokens of its second half to evaluate. Each variant changes one
thing of QERA's start: plain rounding, and factors in the metric of the layers' inputs. Prints perplexity and the part
of the gap that plain rounding leaves; with `--refine`, of the variants with a rounding of their own, also after so many
steps of distillation.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from calibrated import LENGTH, TOKENS, WINDOWS, Bench
from machine import describe, table
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from loftq.calibration.observer import answer_of
from loftq.core import lowrank
from loftq.core.grid import Grid, Quantizer
from loftq.core.metric import Metric, damped
from loftq.core.solvers.calibrated import solve_calibrated
from loftq.core.solvers.methods import METHODS, Method
from loftq.solving.refine import learn

GRADIENT_TOKENS = 8192
_IN_ORDER = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
Weights = dict[str, torch.Tensor]


def linears(model: Any) -> dict[str, nn.Linear]:
    """The linears that are quantized, by name."""
    return {name: module for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}


class Lab:
    """A model in memory, what text says of its layers, and what plain rounding makes of them."""

    def __init__(self, model: Any, windows: torch.Tensor, kind: str, rank: int) -> None:
        self.model, self.windows, self.rank = model, windows, rank
        self.weights: Weights = {name: module.weight.data.clone() for name, module in linears(model).items()}
        self.quantizers: dict[str, Quantizer] = {
            name: Grid(kind, 64).quantizer(weight.shape[1]) for name, weight in self.weights.items()
        }
        self.rounded = {name: self._rounded(name) for name in self.weights}
        self.moments = self.gather()
        self.parts: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}  # backbone, B and A
        self._fisher: Weights = {}
        self._weighted: Weights = {}

    def _rounded(self, name: str) -> torch.Tensor:
        quantizer, weight = self.quantizers[name], self.weights[name]
        return quantizer.decode(*quantizer.quantize(weight), weight.shape)

    @torch.no_grad()
    def gather(self, scale: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> Weights:
        """The second moment of each linear's inputs, of which `scale` makes others first."""
        sums: Weights = {}

        def see(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
                x = scale(inputs[0].flatten(0, 1))
                sums[name] = sums.get(name, torch.zeros(())) + (x.T @ x).double()

            return hook

        shared = ("k_proj", "v_proj", "up_proj")  # see what q_proj and gate_proj do
        handles = [
            module.register_forward_pre_hook(see(name))
            for name, module in linears(self.model).items()
            if not name.endswith(shared)
        ]
        for part in self.windows.split(4):
            self.model.model(input_ids=part)
        for handle in handles:
            handle.remove()
        for name in self.weights:
            for own, other in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
                if name.endswith(own):
                    sums[name] = sums[name.replace(own, other)]
        return {name: moment / self.windows.numel() for name, moment in sums.items()}

    def gradients(self) -> None:
        """Second moments of outputs' gradients, and of inputs weighted by them, for tokens that the model draws."""
        seen: Weights = {}
        total: dict[str, float] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
                seen[name] = inputs[0].detach().flatten(0, 1)

            return hook

        def learn(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, outputs: tuple[torch.Tensor]) -> None:
                g, x = outputs[0].flatten(0, 1), seen[name]
                share = g.square().sum(1, keepdim=True)
                self._fisher[name] = self._fisher.get(name, torch.zeros(())) + (g.T @ g).double()
                self._weighted[name] = self._weighted.get(name, torch.zeros(())) + (x.T @ (x * share)).double()
                total[name] = total.get(name, 0.0) + float(share.sum())

            return hook

        handles: list[Any] = []
        for name, module in linears(self.model).items():
            handles += [module.register_forward_pre_hook(keep(name)), module.register_full_backward_hook(learn(name))]
        generator = torch.Generator().manual_seed(0)
        for part in self.windows[: GRADIENT_TOKENS // LENGTH].split(2):
            embedded = self.model.model.embed_tokens(part).requires_grad_()
            logits = self.model(inputs_embeds=embedded).logits.flatten(0, 1)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
            nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
        for handle in handles:
            handle.remove()
        self._weighted = {name: moment / total[name] for name, moment in self._weighted.items()}

    @property
    def fisher(self) -> Weights:
        """Of outputs."""
        if not self._fisher:
            self.gradients()
        return self._fisher

    @property
    def weighted(self) -> Weights:
        """Inputs' moments, tokens counted by their gradients."""
        if not self._weighted:
            self.gradients()
        return self._weighted

    def factored(
        self, metric: Callable[[str], Metric], outputs: Callable[[str], Metric] = lambda _: Metric(), rank: Any = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Plain rounding and the best factors in a metric of inputs and one of outputs."""
        for name, weight in self.weights.items():
            inputs, left = metric(name), outputs(name)
            residual = weight - self.rounded[name]
            whitened = left.whiten(inputs.whiten(residual).T.contiguous()).T.contiguous()
            factors = lowrank.exact(whitened, rank[name] if rank else self.rank)
            right = inputs.unwhiten(factors.right)
            yield name, self.rounded[name] + left.unwhiten(factors.left.T.contiguous()).T @ right

    def solved(self, method: str, **changes: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """A method of the table, with parts of it changed."""
        preset = replace(METHODS[method], **changes)
        for name, weight in self.weights.items():
            yield name, self._solved(name, weight, preset, self.moments[name])

    def _solved(self, name: str, weight: torch.Tensor, preset: Method, moment: torch.Tensor) -> torch.Tensor:
        quantizer = self.quantizers[name]
        found = solve_calibrated(weight, quantizer, preset, moment, self.rank, preset.iterations, 1.0)
        backbone = quantizer.decode(found.codes, found.scales, weight.shape)
        self.parts[name] = backbone, found.b, found.a
        return backbone + found.b @ found.a

    @torch.no_grad()
    def answers(self) -> Weights:
        """What full precision answers on the text."""
        found = [answer_of(self.model(input_ids=part), True) for part in self.windows.split(4)]
        return {"input_ids": self.windows, **{key: torch.cat([part[key] for part in found]) for key in found[0]}}

    def distilled(self, answers: Weights, steps: int) -> Iterator[tuple[str, torch.Tensor]]:
        """What `loftq quantize` ends with, of the parts that there are."""
        for name, module in linears(self.model).items():
            module.weight.data = self.parts[name][0]
        model = get_peft_model(self.model, LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules="all-linear"))
        layers = {name: model.get_submodule(f"base_model.model.model.{name}") for name in self.parts}
        factors = {name: (at.lora_B["default"].weight, at.lora_A["default"].weight) for name, at in layers.items()}
        for name, (_, *solved) in self.parts.items():
            for factor, value in zip(factors[name], solved, strict=True):
                factor.data = value.clone()
        found = learn(model, self.model, answers, steps, self.rank, 1.0, torch.device("cpu"), seed=0, quiet=True)
        print(f"distilled: {found}", flush=True)
        if found.steps:
            self.parts = {name: (self.parts[name][0], b.data, a.data) for name, (b, a) in factors.items()}
        model.unload().eval()
        yield from ((name, backbone + b @ a) for name, (backbone, b, a) in self.parts.items())

    def ranks(self) -> dict[str, int]:
        """Ranks by what another one takes off a layer's relative output error, for as many numbers in all."""
        gains = []
        for name, weight in self.weights.items():
            metric = Metric.of("full", damped(self.moments[name]))
            whole = metric.norm(weight) ** 2
            values = torch.linalg.svdvals(metric.whiten(weight - self.rounded[name])).double().square()
            cost = sum(weight.shape)
            gains += [(float(v) / whole * weight.numel() / cost, cost, name) for v in values[: 4 * self.rank]]
        left = sum(self.rank * sum(weight.shape) for weight in self.weights.values())
        ranks = dict.fromkeys(self.weights, 0)
        for _, cost, name in sorted(gains, reverse=True):
            if cost <= left:
                ranks[name], left = ranks[name] + 1, left - cost
        return ranks

    @torch.no_grad()
    def propagated(self, share: float, method: str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Factors for the inputs that quantized layers give, wanting `share` of the way to the exact outputs: of
        plain rounding, or with codes and scales by a method of the table too.

        W (Σ x x̂ᵀ + δ) (Σ x̂ x̂ᵀ + δ)⁻¹ is the weight whose outputs on inputs x̂ are nearest to those of W on x, while
        it stays near W. Linears are taken in the order in which they run, each with x̂ as all before it leave it:
        what one has corrected the next must not correct again.
        """
        names = {id(module): name for name, module in linears(self.model).items()}
        layers, state = self.model.model.layers, {}

        def catch(_module: nn.Module, args: tuple[torch.Tensor], kwargs: dict[str, Any]) -> None:
            state["x"], state["kwargs"] = args[0], kwargs
            raise StopIteration

        exact = []
        handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        for part in self.windows.split(4):
            with suppress(StopIteration):
                self.model.model(input_ids=part)
            exact.append(state["x"])
        handle.remove()
        kwargs, moved = state["kwargs"], [x.clone() for x in exact]
        for layer in layers:
            inside = {names[id(module)]: module for module in layer.modules() if id(module) in names}
            groups = [[name for name in inside if name.endswith(ends)] for ends in _IN_ORDER]
            seen = {group[0]: _inputs(layer, inside[group[0]], exact, kwargs) for group in groups}
            exact = [layer(x, **kwargs) for x in exact]
            for group in groups:
                hats = _inputs(layer, inside[group[0]], moved, kwargs)
                moment = sum((x.T @ x).double() for x in hats) / self.windows.numel()
                cross = sum((x.T @ hat).double() for x, hat in zip(seen.pop(group[0]), hats, strict=True))
                h = damped(moment)
                wanted = torch.linalg.solve(h, (cross / self.windows.numel() + h - moment).T).T.float()
                towards = torch.lerp(torch.eye(len(h)), wanted, share)
                metric = Metric.of("full", h)
                for name in group:
                    target = self.weights[name] @ towards
                    if method is None:
                        factors = lowrank.exact(metric.whiten(target - self.rounded[name]), self.rank)
                        found = self.rounded[name] + factors.left @ metric.unwhiten(factors.right)
                    else:
                        found = self._solved(name, target, METHODS[method], moment)
                    inside[name].weight.data = found
            moved = [layer(hat, **kwargs) for hat in moved]
            yield from ((name, module.weight.data) for name, module in inside.items())


def _inputs(layer: nn.Module, module: nn.Module, batches: list[torch.Tensor], kwargs: Any) -> list[torch.Tensor]:
    """What a module in a layer gets, for batches that the layer gets: (tokens, in) each."""
    found: list[torch.Tensor] = []

    def see(_module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        found.append(inputs[0].flatten(0, 1))
        raise StopIteration

    handle = module.register_forward_pre_hook(see)
    for batch in batches:
        with suppress(StopIteration):
            layer(batch, **kwargs)
    handle.remove()
    return found


def power(moment: torch.Tensor, exponent: float) -> torch.Tensor:
    """A power of a moment."""
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp_min(0).pow(exponent) @ vectors.T


def variants(lab: Lab) -> dict[str, Callable[[], Iterator[tuple[str, torch.Tensor]]]]:
    """What to try, by name."""

    def full(moments: Weights) -> Callable[[str], Metric]:
        return lambda name: Metric.of("full", damped(moments[name]))

    def more(damping: float) -> Callable[[str], Metric]:
        def metric(name: str) -> Metric:
            moment = lab.moments[name]
            return Metric.of("full", moment + damping * moment.diagonal().mean() * torch.eye(len(moment)))

        return metric

    fisher_diagonal = lambda name: Metric.of("diagonal", damped(lab.fisher[name]))  # noqa: E731
    fisher = lambda name: Metric.of("full", damped(lab.fisher[name]))  # noqa: E731
    return {
        "no factors": lambda: iter(lab.rounded.items()),
        "weights (LoftQ, T = 1)": lambda: lab.factored(lambda _: Metric()),
        "diagonal of H (QERA, approximate)": lambda: lab.factored(
            lambda name: Metric.of("diagonal", damped(lab.moments[name]))
        ),
        "H (QERA)": lambda: lab.factored(full(lab.moments)),
        "H, damped by 0.1": lambda: lab.factored(more(0.1)),
        "H, damped by 1": lambda: lab.factored(more(1.0)),
        "H to the power 1/2": lambda: lab.factored(
            full({name: power(moment, 0.5) for name, moment in lab.moments.items()})
        ),
        "tokens of one length": lambda: lab.factored(
            full(lab.gather(lambda x: x / x.norm(dim=1, keepdim=True).clamp_min(1e-6)))
        ),
        "tokens by their gradients": lambda: lab.factored(full(lab.weighted)),
        "outputs by Fisher, diagonal": lambda: lab.factored(full(lab.moments), fisher_diagonal),
        "outputs by Fisher, full": lambda: lab.factored(full(lab.moments), fisher),
        "tokens and outputs": lambda: lab.factored(full(lab.weighted), fisher_diagonal),
        "ranks by sensitivity": lambda: lab.factored(full(lab.moments), rank=lab.ranks()),
        "scale search": lambda: lab.solved("qera", scales="search"),
        "feedback (CLoQ)": lambda: lab.solved("cloq"),
        "search, feedback": lambda: lab.solved("cloq", scales="search"),
        "search, intrinsic feedback": lambda: lab.solved("calibrated", iterations=1),
        "the same, 3 turns": lambda: lab.solved("calibrated"),
        "the same, 3 turns, projected": lambda: lab.solved("calibrated", rounding="projected"),
        "the same, 10 turns": lambda: lab.solved("calibrated", iterations=10),
        "quantized inputs": lambda: lab.propagated(0.0),
        "quantized inputs, half way": lambda: lab.propagated(0.5),
        "quantized inputs, exact outputs": lambda: lab.propagated(1.0),
        "3 turns on quantized inputs, half way": lambda: lab.propagated(0.5, "calibrated"),
        "3 turns on quantized inputs, exact outputs": lambda: lab.propagated(1.0, "calibrated"),
    }


def main() -> None:
    """Try, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", help="parts of their names; all by default")
    parser.add_argument("--kind", default="nf4")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--refine", type=int, default=0, help="steps")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens to calibrate on")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options.model, options.data, Path(scratch))
        text = (Path(scratch) / "calibration.txt").read_text(encoding="utf-8")
        ids = AutoTokenizer.from_pretrained(bench.source)(text, return_tensors="pt").input_ids[0]
        order = torch.randperm(len(ids) // LENGTH, generator=torch.Generator().manual_seed(0))
        order = order[: options.tokens // LENGTH]
        windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)[order]
        model = AutoModelForCausalLM.from_pretrained(bench.source, dtype=torch.float32).eval().requires_grad_(False)
        model.config.use_cache = False
        exact = bench.exact()
        lab = Lab(model, windows, options.kind, options.rank)
        answers = lab.answers() if options.refine else {}
        plain = 0.0
        rows: list[tuple[str, ...]] = [("variant", "perplexity", "of the gap", "KL")]

        def measure(name: str, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
            nonlocal plain
            found = dict(weights)
            for key, module in linears(model).items():
                module.weight.data = found[key]
            measured = bench.measure(model)
            perplexity = float(measured["perplexity"])
            plain = plain or perplexity
            gap = 100 * (perplexity - exact) / (plain - exact)
            rows.append((name, f"{perplexity:.3f}", f"{gap:.1f} %", f"{measured['kl']:.4f}"))
            print(*rows[-1], sep="  ", flush=True)

        for name, make in variants(lab).items():
            if plain and options.variants and not any(part in name for part in options.variants):
                continue
            lab.parts.clear()
            for key, module in linears(model).items():
                module.weight.data = lab.weights[key]
            measure(name, make())
            if options.refine and lab.parts:
                measure(f"{name}, refined", lab.distilled(answers, options.refine))
    print(f"\n{bench.source.name}, {options.kind}, rank {options.rank}; {options.data.name}, {WINDOWS} windows")
    print(f"{describe()}\nfull precision {exact:.3f}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
