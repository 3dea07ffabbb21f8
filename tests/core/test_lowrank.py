"""Low-rank factors against the exact SVD in float64."""

from functools import cache

import pytest
import torch

from loftq.core import lowrank
from loftq.core.lowrank import Factors

SHAPES = [(384, 384), (640, 320), (320, 640)]
SPECTRA = ["flat", "steep"]
RANKS = [1, 4, 16, 64]


@cache
def residual(shape: tuple[int, int], spectrum: str, seed: int = 0) -> torch.Tensor:
    """Gaussian, as rounding leaves it, or with singular values that fall by a tenth each."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if spectrum == "flat":
        return noise
    u, s, vh = torch.linalg.svd(noise, full_matrices=False)
    return (u * 0.9 ** torch.arange(len(s))) @ vh


def of_rank(k: int, shape: tuple[int, int] = (512, 512)) -> torch.Tensor:
    """Exactly `k` equal singular values."""
    u, _, vh = torch.linalg.svd(residual(shape, "flat"), full_matrices=False)
    return u[:, :k] @ vh[:k]


@cache
def singular_values(e: torch.Tensor) -> torch.Tensor:
    """The oracle, once for each tensor."""
    return torch.linalg.svdvals(e.double())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(in_features: int, width: int) -> torch.Tensor:
    return torch.randn(in_features, width, generator=generator(1))


def squared(x: torch.Tensor) -> float:
    return float(x.double().square().sum())


def error(e: torch.Tensor, factors: Factors, rank: int) -> float:
    """‖E − left·right‖² in float64, of the first `rank` directions."""
    return squared(e.double() - factors.left[:, :rank].double() @ factors.right[:rank].double())


def check(e: torch.Tensor, factors: Factors, rank: int, captured: float) -> None:
    """At least the share `captured` of what exact factors capture, and no other than is reported."""
    optimum = float(singular_values(e)[:rank].square().sum())
    assert factors.captured(rank) >= captured * optimum
    assert squared(e) - error(e, factors, rank) == pytest.approx(factors.captured(rank), rel=1e-5)
    assert factors.captured(rank) <= (1 + 1e-5) * optimum


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_factorize_captures_what_exact_svd_does(shape: tuple[int, int], spectrum: str, rank: int) -> None:
    """Oracle: the exact SVD in float64. Of a flat spectrum's energy at most 1 % is lost."""
    e = residual(shape, spectrum)
    factors = lowrank.factorize(e, rank, 8, None, generator())
    check(e, factors, rank, 0.99 if spectrum == "flat" else 1 - 1e-5)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (1, 64), (64, 1), (8, 8)])
def test_factorize_is_exact_on_small_sides(shape: tuple[int, int]) -> None:
    """Oracle: the exact SVD in float64, at every rank that fits."""
    e = residual(shape, "flat")
    for rank in range(1, min(shape) + 1):
        check(e, lowrank.factorize(e, rank, 8, None, generator()), rank, 1 - 1e-5)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_gram_and_exact_are_the_svd(shape: tuple[int, int], spectrum: str, rank: int) -> None:
    """Oracle: the exact SVD in float64: singular values, and the energy they hold."""
    e = residual(shape, spectrum)
    expected = singular_values(e)
    for factors in (lowrank.gram(e, rank), lowrank.exact(e, rank)):
        check(e, factors, rank, 1 - 1e-5)
        torch.testing.assert_close(factors.singular_values, expected[:rank], rtol=1e-4, atol=3e-4 * float(expected[0]))


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_krylov_gains_with_depth_and_from_a_warm_start(shape: tuple[int, int], rank: int) -> None:
    """Oracle: the exact SVD in float64. A flat spectrum, since a steep one is found at once."""
    e, noise = residual(shape, "flat"), residual(shape, "flat", seed=1)
    cold = [lowrank.krylov(e, start(shape[1], max(rank, 8)), depth) for depth in (1, 3, 7)]
    shallow, deeper, deep = (factors.captured(rank) for factors in cold)
    assert shallow < 0.9 * deeper
    assert deeper < 0.99 * deep
    check(e, cold[2], rank, 0.99)

    moved = e + 0.1 * noise
    warm = lowrank.factorize(moved, rank, 2, cold[2], generator())
    assert warm.captured(rank) > 1.1 * lowrank.factorize(moved, rank, 2, None, generator()).captured(rank)


@pytest.mark.parametrize("depth", [2, 3, 10])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_start_that_is_exact_in_part_leaves_an_orthonormal_basis(shape: tuple[int, int], depth: int) -> None:
    """Oracle: the exact SVD in float64. Some columns of the second block are noise, and others are not."""
    e = residual(shape, "steep")
    u, s, vh = torch.linalg.svd(e, full_matrices=False)
    previous = s[:16].unsqueeze(1) * vh[:16]
    previous[8:] += 1e-3 * torch.randn(8, shape[1], generator=generator())
    factors = lowrank.factorize(e, 16, depth, Factors(u[:, :16], previous, s[:16].double()), generator())
    check(e, factors, 16, 1 - 1e-5)
    torch.testing.assert_close(factors.left.T @ factors.left, torch.eye(16), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 8, 16])
@pytest.mark.parametrize("shape", [(512, 512), (768, 256), (16, 48)])
def test_zero_residual_gives_zero_factors(shape: tuple[int, int], rank: int) -> None:
    e = torch.zeros(shape)
    for factors in (lowrank.factorize(e, rank, 8, None, generator()), lowrank.exact(e, rank)):
        assert factors.captured(rank) == 0
        a, b = factors.adapter(rank, 2.0)
        assert not a.any()
        assert not b.any()


@pytest.mark.parametrize("true_rank", [1, 3, 8, 9, 20, 24])
def test_factorize_of_a_residual_of_low_rank(true_rank: int) -> None:
    """Oracle: the exact SVD in float64, on both sides of the block's width of 8."""
    e = of_rank(true_rank)
    check(e, lowrank.factorize(e, 8, 8, None, generator()), 8, 1 - 1e-5)


@pytest.mark.parametrize("rows", [4, 20, 40])
def test_factorize_of_a_residual_with_few_nonzero_rows(rows: int) -> None:
    """Oracle: the exact SVD in float64. Pruned rows and padded vocabularies look so."""
    e = residual((512, 512), "flat").clone()
    e[rows:] = 0
    check(e, lowrank.factorize(e, 8, 8, None, generator()), 8, 0.999)


@pytest.mark.parametrize("route", ["gram", "krylov", "exact"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_pythagoras_and_orthonormal_left(shape: tuple[int, int], spectrum: str, route: str) -> None:
    """‖E − UUᵀE‖² = ‖E‖² − ‖UᵀE‖², U orthonormal, right = UᵀE, its rows orthogonal, by falling norm: in float64."""
    e = residual(shape, spectrum)
    factors = {
        "gram": lambda: lowrank.gram(e, 16),
        "krylov": lambda: lowrank.krylov(e, start(shape[1], 16), 5),
        "exact": lambda: lowrank.exact(e, 16),
    }[route]()
    u, right = factors.left.double(), factors.right.double()
    captured = factors.captured(len(right))
    assert error(e, factors, len(right)) == pytest.approx(squared(e) - captured, abs=1e-5 * squared(e))
    torch.testing.assert_close(u.T @ u, torch.eye(u.shape[1]).double(), rtol=0, atol=1e-5)
    scale = float(factors.singular_values[0])
    torch.testing.assert_close(right, u.T @ e.double(), rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(right @ right.T, factors.singular_values.square().diag(), rtol=0, atol=1e-5 * scale**2)
    assert bool((factors.singular_values.diff() <= 0).all())


@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.25])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_adapter_is_the_product_with_norms_shared_evenly(rank: int, scaling: float) -> None:
    """Oracle: `left @ right` in float64; rows of A and columns of B both have norm √(σ / s)."""
    factors = lowrank.factorize(residual((640, 256), "flat"), rank, 8, None, generator())
    a, b = factors.adapter(rank, scaling)
    assert (a.shape, b.shape) == ((rank, 256), (640, rank))
    product = factors.left[:, :rank].double() @ factors.right[:rank].double()
    assert squared(scaling * b.double() @ a.double() - product) <= 1e-12 * squared(product)
    share = (factors.singular_values[:rank] / scaling).sqrt()
    torch.testing.assert_close(a.double().norm(dim=1), share, rtol=1e-4, atol=0)
    torch.testing.assert_close(b.double().norm(dim=0), share, rtol=1e-4, atol=0)


def test_adapter_leaves_zero_directions_at_zero() -> None:
    """Oracle: the factors' own zeros: directions without norm must not become 0 / 0."""
    left, _ = torch.linalg.qr(residual((32, 8), "flat"))
    values = torch.tensor([2.0, 1, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    right = torch.eye(8) * values.float()
    a, b = Factors(left, right, values).adapter(8, 0.5)
    assert not a[2:].any()
    assert not b[:, 2:].any()
    torch.testing.assert_close(0.5 * b @ a, left @ right)


@pytest.mark.parametrize("shape", [(384, 384), (48, 32)])
def test_same_seed_same_bytes(shape: tuple[int, int]) -> None:
    e = residual(shape, "flat")
    first, second = (lowrank.factorize(e, 4, 8, None, generator(7)) for _ in range(2))
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)
    assert torch.equal(first.singular_values, second.singular_values)
