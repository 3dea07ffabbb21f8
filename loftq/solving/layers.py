"""The jobs of a run. Each job brings one tensor of the source to its place in the output.

Jobs are independent and idempotent: any number of workers may run them in any order, and an interrupted job is simply
run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from tqdm import tqdm

from loftq.artifacts.rows import layer_row
from loftq.artifacts.staging import Staging
from loftq.calibration.statistics import Statistics
from loftq.core.affine import AffineQuantizer
from loftq.core.grid import Decoder, Quantizer
from loftq.core.kernels.products import fast_products
from loftq.core.solvers.calibrated import solve_calibrated
from loftq.core.solvers.loftq import solve_loftq
from loftq.core.solvers.methods import METHODS, WITHOUT_TEXT
from loftq.core.solvers.pooled import solve_pooled
from loftq.core.solvers.pooled_calibrated import solve_pooled_calibrated
from loftq.core.solvers.solution import Solution, check_solution, trace_of_all, unsolvable
from loftq.core.solvers.trellis_coded import solve_trellis
from loftq.core.trellis import TrellisQuantizer
from loftq.display import one_line
from loftq.errors import OptionError
from loftq.formats import adapter, expert_factors
from loftq.formats.shard_writer import ShardWriter
from loftq.models import naming
from loftq.planning.plan import Layer, Plan
from loftq.planning.recipe import Recipe, layer_seed
from loftq.planning.run import Run
from loftq.planning.weights import ExpertReader, check_finite, digest_of, is_finite, read_source_weight
from loftq.solving.expert_inputs import expert_inputs

Job = Callable[[Layer, ShardWriter], dict[str, Any]]  # writes the tensors of a layer, and returns its record


class Finished(Protocol):
    """Called when a job is done and its tensors are written."""

    def __call__(self, name: str, record: Mapping[str, Any], shown: str = "") -> None:
        """Record the job in the journal. What is `shown` stands beside the progress bar."""


RunJobs = Callable[[Sequence[str], ShardWriter, Finished], None]  # runs the jobs of tensors in other processes


def solve_all(
    plan: Plan,
    staging: Staging,
    statistics: Statistics | None,
    run: Run,
    job: Job | None = None,
    run_elsewhere: RunJobs | None = None,
) -> None:
    """Run a job for each tensor that is not in place yet, with a progress bar on stderr.

    `statistics` are those of the layers' inputs, where text was given. `job` does the work of a layer if it is not to
    be solved by the method of the recipe. Jobs run in threads of this process, unless `run_elsewhere` runs them.
    """
    sizes = sizes_of_jobs(plan)
    everything = sum(sizes.values())
    with one_thread_each(), staging.writing([*plan.backbone, plan.adapter]) as writer:
        left = [name for name in sizes if name not in staging.done]
        begun = everything - sum(sizes[name] for name in left)
        bar = tqdm(total=everything, initial=begun, unit="w", unit_scale=True, disable=run.quiet, dynamic_ncols=True)

        def finished(name: str, record: Mapping[str, Any], shown: str = "") -> None:
            staging.note(name, record)
            bar.set_postfix_str(shown or name.removesuffix(".weight"), refresh=False)
            bar.update(sizes[name])

        def work(name: str) -> None:
            finished(name, run_job(plan, name, statistics, writer, run.device, job))

        with bar:
            # in this thread: they are drawn from torch's own generator, which all threads share
            for name in [name for name in left if name in plan.created]:
                work(name)
            rest = [name for name in left if name not in plan.created]
            if run_elsewhere is None:
                run_jobs(work, rest, run.workers)
            else:
                run_elsewhere(rest, writer, finished)


def sizes_of_jobs(plan: Plan) -> dict[str, int]:
    """The number of values of the tensor that each job makes, by the name of the job, in the order of the jobs."""
    # embeddings come first: at the end one worker would be busy with them while the others wait
    kept = {name: spec.numel for name, spec in {**plan.created, **plan.passed}.items()}
    return {**kept, **{layer.tensor: layer.weights for layer in plan.layers}}


def run_job(
    plan: Plan,
    name: str,
    statistics: Statistics | None,
    writer: ShardWriter,
    device: torch.device,
    job: Job | None = None,
) -> dict[str, Any]:
    """Do the job of a tensor of the source, or of a parameter that no tensor provides. Returns its record."""
    layer = next((layer for layer in plan.layers if layer.tensor == name), None)
    if layer is not None and job is not None:
        return job(layer, writer)
    if layer is not None and layer.experts:
        return _solve_experts(plan, layer, statistics, writer, device)
    if layer is not None:
        return _solve_layer(plan, layer, statistics, writer, device)
    return _pass_through(plan, name, writer) if name in plan.passed else _create(plan, name, writer)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """One torch thread a job: a matrix product's last bits depend on how many threads share it.

    They also depend on the library, which is the same for all jobs (`fast_products`).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with fast_products():
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


def _solve_layer(
    plan: Plan, layer: Layer, statistics: Statistics | None, writer: ShardWriter, device: torch.device
) -> dict[str, Any]:
    weight, digest = read_source_weight(plan, layer, device)
    if statistics is not None:
        statistics.check_weights(layer.module, {layer.tensor: digest})
    moment = None if statistics is None else statistics.moment(layer.module)
    solution, packed = _solve_and_pack(plan, layer, weight, moment)
    factors = dict(zip(adapter.keys(layer.module), (solution.a, solution.b), strict=True))
    _check_stored(layer, factors)
    written = {name: writer.write(name, tensor) for name, tensor in {**packed, **factors}.items()}
    return {"sha256": digest, "row": layer_row(plan, layer, solution.trace), "written": written}


def _solve_experts(
    plan: Plan, layer: Layer, statistics: Statistics | None, writer: ShardWriter, device: torch.device
) -> dict[str, Any]:
    """Solve fused experts one after the other. Only their factors are kept until all are solved."""
    reader = ExpertReader(plan, layer)
    inputs = expert_inputs(plan, layer, statistics, device)
    specs = plan.layout.specs(layer.module, layer.shape, plan.grid(layer), plan.recipe.dtype)
    streams = {spec.name: writer.piecewise(spec.name) for spec in specs}
    traces, pairs = [], []
    for index, weight in enumerate(reader):
        expert = replace(layer, module=f"{layer.module}.{index}")
        moment = None if inputs is None else inputs.moment(index)
        solution, packed = _solve_and_pack(plan, expert, weight.to(device), moment, layer.module)
        for name, tensor in packed.items():
            streams[name].add(tensor)
        traces.append(solution.trace)
        pairs.append((solution.a.cpu(), solution.b.cpu()))
    if statistics is not None:
        statistics.check_weights(layer.owner, reader.digests)
    keys = adapter.factor_keys(layer.module, layer.shape)
    factors = dict(zip(keys, expert_factors.joined(pairs), strict=True))
    _check_stored(layer, factors)
    written = {name: stream.finish() for name, stream in streams.items()}
    written |= {name: writer.write(name, tensor) for name, tensor in factors.items()}
    counts = None if inputs is None else inputs.counts
    row = layer_row(plan, layer, trace_of_all(traces, counts)) | ({} if counts is None else {"expert_tokens": counts})
    return {"sha256": reader.digest, "row": row, "written": written}


def _solve_and_pack(
    plan: Plan, layer: Layer, weight: torch.Tensor, moment: torch.Tensor | None, name: str | None = None
) -> tuple[Solution, dict[str, torch.Tensor]]:
    """The solution of a linear or an expert, and its packed tensors. The tensors of an expert are those of `name`."""
    recipe, grid = plan.recipe, plan.grid(layer)
    _check_range(plan, layer, weight)
    solution = solve_layer(plan, layer, weight, moment, plan.decoder(layer), recipe.iters)
    arguments = layer.shape, grid, recipe.dtype, solution.codes, solution.scales
    packed = plan.layout.tensors(name or layer.module, *arguments)
    _check_stored(layer, packed)
    return solution, packed


def _check_stored(layer: Layer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise OptionError for a tensor whose values do not fit its dtype. Codes fit, whatever they are stored as."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not name.endswith(".weight") and not is_finite(tensor):
            raise unsolvable(layer.module, f"its {name} does not fit {tensor.dtype}")


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
    quantizer: Decoder,
    iterations: int,
) -> Solution:
    """Solve the weight of a layer. Raises OptionError with its name for a result that is NaN or Inf."""
    seed = layer_seed(plan.recipe.seed, layer.module)
    try:
        solution = solve_by(plan.recipe, weight, moment, quantizer, iterations, seed, layer.rank)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise unsolvable(layer.module, one_line(error)) from error
    check_solution(solution, quantizer, layer.module)
    return solution


def solve_by(
    recipe: Recipe,
    weight: torch.Tensor,
    moment: torch.Tensor | None,
    quantizer: Decoder,
    iters: int,
    seed: int,
    rank: int,
) -> Solution:
    """Solve one weight by the method of a recipe; without data if no `moment` of its inputs is known."""
    method, scaling = recipe.solving, recipe.scaling
    if moment is None and method.needs_moment:
        method = METHODS[WITHOUT_TEXT]
    if isinstance(quantizer, TrellisQuantizer):
        return solve_trellis(weight, quantizer, method, moment, rank, iters, scaling, seed=seed)
    quantizer = cast(Quantizer, quantizer)
    if isinstance(quantizer, AffineQuantizer) and recipe.pool_size is not None:
        if moment is None or method.metric == "identity":
            return solve_pooled(weight, quantizer, rank, iters, scaling, recipe.pool_size, seed=seed)
        pool = recipe.pool_size
        return solve_pooled_calibrated(weight, quantizer, method, moment, rank, iters, scaling, pool, seed=seed)
    if moment is None and method.plain:
        return solve_loftq(weight, quantizer, rank, iters, scaling, svd=recipe.svd, seed=seed)
    return solve_calibrated(weight, quantizer, method, moment, rank, iters, scaling, seed=seed)


def _pass_through(plan: Plan, name: str, writer: ShardWriter) -> dict[str, Any]:
    stored = plan.source.checkpoint.read(name)
    spec = plan.passed[name]
    if stored.is_floating_point():
        check_finite(stored, name, plan.source)
    written = stored.to(spec.dtype)
    if written.is_floating_point() and stored.dtype != written.dtype and not is_finite(written):
        raise OptionError(f"tensor {name!r} does not fit --compute-dtype {plan.recipe.compute_dtype}: use bfloat16")
    return {"sha256": digest_of(stored), "written": {spec.name: writer.write(spec.name, written)}}


def _create(plan: Plan, key: str, writer: ShardWriter) -> dict[str, Any]:
    """Initialize a parameter that is not in the checkpoint: the head of a new task, a pooler."""
    seed = layer_seed(plan.recipe.seed, key)
    spec = plan.created[key]
    tensor = naming.initial_tensor(plan.model, key, seed).to(spec.dtype)
    return {"written": {spec.name: writer.write(spec.name, tensor)}}
