"""The jobs of a run. Each job brings one tensor of the source to its place in the output.

Jobs are independent and idempotent: any number of workers may run them in any order, and an interrupted job is simply
run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from tqdm import tqdm

from loftq.artifacts.rows import layer_row
from loftq.artifacts.staging import Staging
from loftq.calibration.statistics import Statistics
from loftq.core.affine import AffineQuantizer
from loftq.core.grid import Quantizer
from loftq.core.solvers.calibrated import solve_calibrated
from loftq.core.solvers.loftq import solve_loftq
from loftq.core.solvers.methods import METHODS, WITHOUT_TEXT
from loftq.core.solvers.pooled import solve_pooled
from loftq.core.solvers.pooled_calibrated import solve_pooled_calibrated
from loftq.core.solvers.solution import Solution, check_solution, unsolvable
from loftq.display import one_line
from loftq.errors import OptionError
from loftq.formats import adapter
from loftq.formats.shard_writer import ShardWriter
from loftq.models import naming
from loftq.planning.plan import Layer, Plan
from loftq.planning.recipe import Recipe, layer_seed
from loftq.planning.run import Run
from loftq.planning.weights import check_finite, digest_of, is_finite, read_source_weight


class LayerStatistics(Protocol):
    """What a job reads of the statistics of a calibration."""

    def check_weight(self, layer: Layer, digest: str) -> None:
        """Raise ArtifactError unless a layer's tensor has the hash of the weights that the model was run with."""

    def moment(self, module: str) -> torch.Tensor | None:
        """The moment H (in, in) of a module's inputs; None if the text never reached it."""


class Made(NamedTuple):
    """The result of a job: its record without the hashes of what was written, and the tensors to write by name."""

    record: dict[str, Any]
    tensors: dict[str, torch.Tensor]


class Finished(Protocol):
    """Called when a job is done and its tensors are written."""

    def __call__(self, name: str, record: Mapping[str, Any], shown: str = "") -> None:
        """Record the job in the journal; `shown` stands beside the progress bar."""


Elsewhere = Callable[[Sequence[str], ShardWriter, Finished], None]  # runs jobs in other processes


def solve_all(
    plan: Plan, staging: Staging, statistics: Statistics | None, run: Run, elsewhere: Elsewhere | None = None
) -> None:
    """Run a job for each tensor that is not in place yet, with a progress bar on stderr.

    `statistics` are those of the layers' inputs, where text was given. Jobs run in threads of this process, or
    `elsewhere`.
    """
    sizes = _sizes(plan)
    with one_thread_each(), staging.writing([*plan.backbone, plan.adapter]) as writer:
        left = [name for name in sizes if name not in staging.done]
        total = sum(sizes.values())
        begun = total - sum(sizes[name] for name in left)
        bar = tqdm(total=total, initial=begun, unit="w", unit_scale=True, disable=run.quiet, dynamic_ncols=True)

        def finished(name: str, record: Mapping[str, Any], shown: str = "") -> None:
            staging.note(name, record)
            bar.set_postfix_str(shown or name.removesuffix(".weight"), refresh=False)
            bar.update(sizes[name])

        def work(name: str) -> None:
            made = make_tensors(plan, name, statistics, run.device)
            finished(
                name, {**made.record, "written": {key: writer.write(key, made.tensors[key]) for key in made.tensors}}
            )

        with bar:
            # in this thread: they are drawn from torch's own generator, which all threads share
            for name in [name for name in left if name in plan.created]:
                work(name)
            rest = [name for name in left if name not in plan.created]
            if elsewhere is None:
                run_jobs(work, rest, run.workers)
            else:
                elsewhere(rest, writer, finished)


def _sizes(plan: Plan) -> dict[str, int]:
    """The number of values of each tensor that a job makes, by the name of the job."""
    # embeddings come first: at the end one worker would be busy with them while the others wait
    kept = {name: spec.numel for name, spec in {**plan.created, **plan.passed}.items()}
    return {**kept, **{layer.tensor: layer.weights for layer in plan.layers}}


def make_tensors(plan: Plan, name: str, statistics: LayerStatistics | None, device: torch.device) -> Made:
    """Do the job of a tensor of the source, or of a parameter that no tensor provides."""
    layer = next((layer for layer in plan.layers if layer.tensor == name), None)
    if layer is not None:
        return _solve_layer(plan, layer, statistics, device)
    return _pass_through(plan, name) if name in plan.passed else _create(plan, name)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """One torch thread a job: a matrix product's last bits depend on how many threads share it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_jobs(work: Callable[[str], None], names: Sequence[str], workers: int) -> None:
    """Run independent, idempotent jobs; the first failure stops those not yet begun and is raised."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="loftq-solver")
    futures: list[Future[None]] = []
    try:
        futures = [pool.submit(work, name) for name in names]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _solve_layer(plan: Plan, layer: Layer, statistics: LayerStatistics | None, device: torch.device) -> Made:
    recipe = plan.recipe
    weight, digest = read_source_weight(plan, layer, device)
    if statistics is not None:
        statistics.check_weight(layer, digest)
    moment = None if statistics is None else statistics.moment(layer.module)
    _check_range(plan, layer, weight)
    solution = solve_layer(plan, layer, weight, moment, plan.quantizer(layer), recipe.iters)
    grid = plan.grid(layer)
    packed = plan.layout.tensors(layer.module, layer.shape, grid, recipe.dtype, solution.codes, solution.scales)
    factors = dict(zip(adapter.keys(layer.module), (solution.a, solution.b), strict=True))
    tensors = {**packed, **factors}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise unsolvable(layer.module, f"its {name} does not fit {tensor.dtype}")
    return Made({"sha256": digest, "row": layer_row(plan, layer, solution.trace)}, tensors)


def _check_range(plan: Plan, layer: Layer, weight: torch.Tensor) -> None:
    """Raise OptionError for a weight whose values the compute dtype cannot hold when it is dequantized."""
    largest = float(weight.abs().max())
    if largest > torch.finfo(plan.recipe.dtype).max:
        name = plan.recipe.compute_dtype
        raise OptionError(
            f"tensor {layer.tensor!r} holds {largest:.3g}, which does not fit --compute-dtype {name}: use bfloat16"
        )


def solve_layer(
    plan: Plan,
    layer: Layer,
    weight: torch.Tensor,
    moment: torch.Tensor | None,
    quantizer: Quantizer,
    iterations: int,
) -> Solution:
    """Solve the weight of a layer. Raises OptionError with its name for a result that is NaN or Inf."""
    seed = layer_seed(plan.recipe.seed, layer.module)
    try:
        solution = solve_by(plan.recipe, weight, moment, quantizer, iterations, seed)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise unsolvable(layer.module, one_line(error)) from error
    check_solution(solution, quantizer, layer.module)
    return solution


def solve_by(
    recipe: Recipe, weight: torch.Tensor, moment: torch.Tensor | None, quantizer: Quantizer, iters: int, seed: int
) -> Solution:
    """Solve one weight by the method of a recipe; without data if no `moment` of its inputs is known."""
    method, rank, scaling = recipe.solving, recipe.rank, recipe.scaling
    if moment is None and method.needs_moment:
        method = METHODS[WITHOUT_TEXT]
    if isinstance(quantizer, AffineQuantizer) and recipe.pool_size is not None:
        if moment is None or method.metric == "identity":
            return solve_pooled(weight, quantizer, rank, iters, scaling, recipe.pool_size, seed=seed)
        pool = recipe.pool_size
        return solve_pooled_calibrated(weight, quantizer, method, moment, rank, iters, scaling, pool, seed=seed)
    if moment is None and method.plain:
        return solve_loftq(weight, quantizer, rank, iters, scaling, svd=recipe.svd, seed=seed)
    return solve_calibrated(weight, quantizer, method, moment, rank, iters, scaling, seed=seed)


def _pass_through(plan: Plan, name: str) -> Made:
    stored = plan.source.checkpoint.read(name)
    spec = plan.passed[name]
    if stored.is_floating_point():
        check_finite(stored, name, plan.source)
    cast = stored.to(spec.dtype)
    if cast.is_floating_point() and stored.dtype != cast.dtype and not is_finite(cast):
        raise OptionError(f"tensor {name!r} does not fit --compute-dtype {plan.recipe.compute_dtype}: use bfloat16")
    return Made({"sha256": digest_of(stored)}, {spec.name: cast})


def _create(plan: Plan, key: str) -> Made:
    """Initialize a parameter that is not in the checkpoint: the head of a new task, a pooler."""
    seed = layer_seed(plan.recipe.seed, key)
    spec = plan.created[key]
    return Made({}, {spec.name: naming.initial_tensor(plan.model, key, seed).to(spec.dtype)})
