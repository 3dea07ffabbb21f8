"""Products of float32 matrices by the faster library, where it is as exact."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from loftq.core.kernels import products

SETTING = products._setting()
pytestmark = pytest.mark.skipif(SETTING is None, reason="this torch has no setting for float32 products")


@pytest.fixture(autouse=True)
def _decided_anew() -> Iterator[None]:
    products._worth_it.cache_clear()
    yield
    products._worth_it.cache_clear()


def processor(monkeypatch: pytest.MonkeyPatch, vendor: str, capability: str, error: float) -> None:
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "_error", lambda: error)


@pytest.mark.parametrize(
    ("vendor", "capability", "error", "faster"),
    [
        ("vendor_id : AuthenticAMD", "AVX512", 5e-7, True),
        ("vendor_id : AuthenticAMD", "AVX512", 2e-3, False),  # inputs rounded to bfloat16
        ("vendor_id : AuthenticAMD", "AVX2", 5e-7, False),
        ("vendor_id : GenuineIntel", "AVX512", 5e-7, False),
    ],
)
def test_only_exact_products_of_processors_that_mkl_slows_down(
    vendor: str, capability: str, error: float, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the setting of torch; it is put back, after an error too."""
    before = SETTING.fp32_precision
    processor(monkeypatch, vendor, capability, error)

    def fail() -> None:
        with products.fast_products():
            assert products.are_fast() is faster
            assert SETTING.fp32_precision == ("bf16" if faster else before)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert SETTING.fp32_precision == before
    assert not products.are_fast()


def test_products_are_those_of_float32() -> None:
    """Oracle: float64; on whatever processor, and whatever was decided."""
    a, b = torch.randn(2, 320, 320, generator=torch.Generator().manual_seed(0))
    with products.fast_products():
        product = a @ b
    exact = a.double() @ b.double()
    assert float((product - exact).norm() / exact.norm()) < 2e-6


def test_a_setting_of_the_user_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: products of inputs in bfloat16, which a user may allow, are not taken for exact ones."""
    processor(monkeypatch, "vendor_id : AuthenticAMD", "AVX512", 2e-3)
    before = SETTING.fp32_precision
    SETTING.fp32_precision = "bf16"
    try:
        assert not products.are_fast()
        with products.fast_products():
            assert not products.are_fast()
            assert SETTING.fp32_precision == "bf16"
    finally:
        SETTING.fp32_precision = before


def test_an_old_torch_has_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: nothing changes, nothing fails."""
    monkeypatch.setattr(products, "_setting", lambda: None)
    with products.fast_products():
        assert not products.are_fast()
