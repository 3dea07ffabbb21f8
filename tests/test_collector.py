"""Oracle: what Python's own collector says of itself."""

from __future__ import annotations

import gc

import pytest

from loftq.collector import paused_collector


def test_it_is_paused_in_the_block_and_as_before_afterwards() -> None:
    assert gc.isenabled()
    with paused_collector():
        assert not gc.isenabled()
        with paused_collector():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="x"), paused_collector():
        raise ValueError("x")
    assert gc.isenabled()
