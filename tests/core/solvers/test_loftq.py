"""The alternation against LoftQ written independently, in float64, with bitsandbytes' rounding and an exact SVD."""

import math
from functools import cache

import bitsandbytes.functional as bnb
import pytest
import torch

from loftq.core.blockwise import BlockQuantizer
from loftq.core.solvers.loftq import solve_loftq
from loftq.core.solvers.methods import SVD
from loftq.core.solvers.solution import Solution
from loftq.errors import OptionError, UnknownNameError

NF4 = BlockQuantizer("nf4")
SHAPES = [(384, 384), (640, 320), (320, 640)]  # large enough that both ranks take the Krylov route
SPECTRA = ["flat", "steep"]


@cache
def weight(shape: tuple[int, int] = (384, 384), spectrum: str = "flat") -> torch.Tensor:
    """Gaussian, or with singular values that fall as 1/k, of the size of a model's weights."""
    noise = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if spectrum == "flat":
        return noise
    u, s, vh = torch.linalg.svd(noise, full_matrices=False)
    return (u * (s[0] / torch.arange(1, len(s) + 1))) @ vh


@cache
def loftq(shape: tuple[int, int], spectrum: str, rank: int, iterations: int) -> list[float]:
    """LoftQ's Algorithm 1 as published: ‖W − Q_t − B_t·A_t‖ of every iteration."""
    w = weight(shape, spectrum).double()
    low_rank, errors = torch.zeros_like(w), []
    for _ in range(iterations):
        packed, state = bnb.quantize_4bit((w - low_rank).float(), blocksize=64, quant_type="nf4")
        q = bnb.dequantize_4bit(packed, state).double()
        u, s, vh = torch.linalg.svd(w - q, full_matrices=False)
        low_rank = u[:, :rank] * s[:rank] @ vh[:rank]
        errors.append(float((w - q - low_rank).norm()))
    return errors


def left_over(w: torch.Tensor, solution: Solution, scaling: float, quantizer: BlockQuantizer = NF4) -> float:
    """‖W − Q − s·B·A‖ in float64, from what was returned alone."""
    q = quantizer.decode(solution.codes, solution.scales, w.shape).double()
    return float((w.double() - q - scaling * solution.b.double() @ solution.a.double()).norm())


def same(first: Solution, second: Solution) -> bool:
    return first.trace == second.trace and all(
        torch.equal(x, y)
        for x, y in (
            (first.codes, second.codes),
            (first.scales.values, second.scales.values),
            (first.a, second.a),
            (first.b, second.b),
        )
    )


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("iterations", [1, 5])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_final_error_is_that_of_independent_loftq(
    shape: tuple[int, int], spectrum: str, iterations: int, rank: int
) -> None:
    """Oracle: `loftq`, whose best iterate may be at most 0.2 % better; and less was left than by plain rounding."""
    solution = solve_loftq(weight(shape, spectrum), NF4, rank, iterations, 1.0)
    assert solution.trace.final <= 1.002 * min(loftq(shape, spectrum, rank, 5)[:iterations])
    assert solution.trace.final < solution.trace.plain


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_iterations_are_those_of_independent_loftq(shape: tuple[int, int], spectrum: str) -> None:
    """Oracle: `loftq`, iteration by iteration; a code that float32 rounds the other way moves later ones a little."""
    solution = solve_loftq(weight(shape, spectrum), NF4, 16, 5, 1.0, svd="exact")
    assert solution.trace.iterations == pytest.approx(loftq(shape, spectrum, 16, 5), rel=5e-4)


@pytest.mark.parametrize("quantizer", [NF4, BlockQuantizer("nf2"), BlockQuantizer("nf3", 32, double_quant=True)])
@pytest.mark.parametrize("svd", SVD)
@pytest.mark.parametrize("scaling", [2.0, 0.25, 8**-0.5])
def test_trace_is_what_the_returned_tensors_leave(scaling: float, svd: str, quantizer: BlockQuantizer) -> None:
    """Oracle: ‖W − Q − s·B·A‖ recomputed in float64; and, since s is folded in, the same at every s."""
    w = weight((256, 320))
    solution, unscaled = (solve_loftq(w, quantizer, 8, 3, s, svd=svd) for s in (scaling, 1.0))
    assert solution.trace.weight == pytest.approx(float(w.double().norm()), rel=1e-6)
    assert solution.trace.final == pytest.approx(left_over(w, solution, scaling, quantizer), rel=1e-5)
    assert unscaled.trace.final == pytest.approx(left_over(w, unscaled, 1.0, quantizer), rel=1e-5)
    assert solution.trace == unscaled.trace
    assert torch.equal(solution.codes, unscaled.codes)


@pytest.mark.parametrize("quantizer", [NF4, BlockQuantizer("nf2")], ids=lambda q: q.codebook)
def test_every_iteration_of_the_trace(quantizer: BlockQuantizer) -> None:
    """Oracle: the runs that stop at each iteration, what they return measured in float64."""
    w = weight((256, 320), "steep")
    trace = solve_loftq(w, quantizer, 8, 4, 1.0, svd="exact").trace
    assert len(trace.iterations) == 4
    for t in (1, 2, 3):
        shorter = solve_loftq(w, quantizer, 8, t, 1.0, svd="exact")
        assert shorter.trace.iterations == trace.iterations[:t]
        assert shorter.trace.final == pytest.approx(left_over(w, shorter, 1.0, quantizer), rel=1e-5)


def test_kept_is_the_best_iteration_and_what_is_returned_is_its() -> None:
    """Oracle: the trace's own minimum, and the returned tensors, on pruned rows, whose error rises again."""
    w = weight().clone()
    w[20:] = 0
    solution = solve_loftq(w, NF4, 16, 5, 1.0, svd="exact")
    errors = solution.trace.iterations
    assert solution.trace.kept == 1 + errors.index(min(errors))
    assert solution.trace.kept < 5
    assert errors[-1] > 1.001 * solution.trace.final
    assert left_over(w, solution, 1.0) == pytest.approx(min(errors), rel=1e-5)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_is_bitsandbytes_own_rounding(shape: tuple[int, int], spectrum: str) -> None:
    """Oracle: W less bitsandbytes' NF4 round trip, in float64."""
    w = weight(shape, spectrum)
    rounded = bnb.dequantize_4bit(*bnb.quantize_4bit(w, blocksize=64, quant_type="nf4"))
    trace = solve_loftq(w, NF4, 4, 1, 1.0).trace
    assert trace.plain == pytest.approx(float((w.double() - rounded.double()).norm()), rel=1e-6)


@pytest.mark.parametrize("rank", [0, 4])
def test_no_iterations_is_qlora(rank: int) -> None:
    """Oracle: bitsandbytes' codes; B = 0 and A uniform within ±1/√in, as `torch.nn.Linear` draws it."""
    w = weight((320, 640))
    solution = solve_loftq(w, NF4, rank, 0, 2.0)
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    assert torch.equal(solution.codes, packed.view(-1))
    assert torch.equal(solution.scales.values, state.absmax)
    assert (solution.a.shape, solution.b.shape) == ((rank, 640), (320, rank))
    assert not solution.b.any()
    assert solution.trace.kept == 0
    assert solution.trace.iterations == ()
    assert solution.trace.final == solution.trace.plain == pytest.approx(left_over(w, solution, 2.0), rel=1e-6)
    if rank:
        bound = 640**-0.5
        assert 0.99 * bound < float(solution.a.abs().max()) <= bound
        assert float(solution.a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("svd", SVD)
def test_rank_zero_has_no_adapter_however_many_iterations(svd: str) -> None:
    """Oracle: the run without iterations."""
    assert same(solve_loftq(weight(), NF4, 0, 5, 1.0, svd=svd), solve_loftq(weight(), NF4, 0, 0, 1.0))


@pytest.mark.parametrize("svd", SVD)
@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (1, 128)])
def test_full_rank_leaves_nothing_of_the_weight(shape: tuple[int, int], svd: str) -> None:
    """Oracle: W itself: at the rank of the smaller side, Q + s·B·A is W to rounding."""
    w = weight(shape)
    solution = solve_loftq(w, NF4, min(shape), 2, 0.5, svd=svd)
    assert left_over(w, solution, 0.5) <= 1e-6 * float(w.norm())
    assert solution.trace.final <= 1e-3 * solution.trace.plain  # a difference of squares: √ of float32's rounding


@pytest.mark.parametrize("svd", SVD)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("spectrum", ["zero", "representable"])
def test_weights_that_leave_no_error(spectrum: str, double_quant: bool, svd: str) -> None:
    """Oracle: W itself. Zeros, and values that are levels times scales: Q is W, and the adapter nothing."""
    quantizer = BlockQuantizer("nf4", double_quant=double_quant)
    levels = quantizer.levels[torch.randint(16, (384, 384), generator=torch.Generator().manual_seed(0))]
    levels.view(-1, 64)[:, 0] = 1  # one scale for all blocks: in 8 bits, too, it is the mean and exact
    w = torch.zeros(384, 384) if spectrum == "zero" else 0.03125 * levels
    solution = solve_loftq(w, quantizer, 8, 3, 2.0, svd=svd)
    assert torch.equal(quantizer.decode(solution.codes, solution.scales, w.shape), w)
    assert not solution.b.any()
    assert not solution.a.any()
    assert solution.trace.plain == solution.trace.final == 0


@pytest.mark.parametrize("rows", [4, 20, 40])
@pytest.mark.parametrize("rest", ["zero", "representable"])
def test_weights_that_leave_an_error_of_low_rank(rest: str, rows: int) -> None:
    """Oracle: the exact SVD, and the error recomputed in float64. Pruned rows; rows already on the grid."""
    w = weight().clone()
    w[rows:] = 0 if rest == "zero" else NF4.decode(*NF4.quantize(w), w.shape)[rows:]
    solution, exact = (solve_loftq(w, NF4, 8, 5, 1.0, svd=svd) for svd in ("krylov", "exact"))
    assert left_over(w, solution, 1.0) <= 1.002 * left_over(w, exact, 1.0) + 1e-6 * float(w.norm())
    assert solution.trace.final == pytest.approx(left_over(w, solution, 1.0), rel=1e-3, abs=1e-3 * solution.trace.plain)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("iterations", [0, 3])
@pytest.mark.parametrize("svd", SVD)
def test_same_seed_same_bytes(svd: str, iterations: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = [solve_loftq(weight(), NF4, 8, iterations, 1.0, svd=svd, seed=seed) for seed in (3, 3, 4)]
    finally:
        torch.set_num_threads(before)
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2]) == (svd == "exact" and iterations > 0)  # where nothing is drawn


def test_weight_is_left_as_it_was() -> None:
    w = weight().clone()
    solve_loftq(w, NF4, 8, 3, 1.0)
    assert torch.equal(w, weight())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 65}, r"rank 65 is outside 0\.\.64"),
        ({"rank": -1}, r"rank -1 is outside 0\.\.64"),
        ({"iterations": -1}, "iterations must be 0 or more, not -1"),
        ({"scaling": 0.0}, "scaling must be above 0, not 0"),
        ({"scaling": -1.0}, "scaling must be above 0, not -1"),
        ({"scaling": math.nan}, "scaling must be above 0, not nan"),
        ({"scaling": math.inf}, "scaling must be above 0, not inf"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        solve_loftq(
            **{"weight": weight((64, 128)), "quantizer": NF4, "rank": 4, "iterations": 1, "scaling": 1.0, **options}
        )


def test_unknown_svd_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown svd 'krilov'; did you mean krylov\? \(known: exact, krylov\)"):
        solve_loftq(weight(), NF4, 4, 1, 1.0, svd="krilov")
