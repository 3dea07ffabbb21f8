"""The rates beside the progress bar."""

from __future__ import annotations

from loftq.cluster.rates import Rates


def test_the_workers_of_a_node_stand_together() -> None:
    rates = Rates("w")
    rates.add("10.0.0.2", 1, 1000, 2.0)
    assert str(rates) == "10.0.0.2: 1 x 500w/s"
    rates.add("10.0.0.2", 2, 1000, 1.0)
    assert str(rates) == "10.0.0.2: 2 x 750w/s"
    rates.add("10.0.0.3", 1, 1000, 1.0)
    assert str(rates) == "10.0.0.2: 2 x 750w/s, 10.0.0.3: 1 x 1.00kw/s"


def test_all_that_a_worker_has_done_counts() -> None:
    rates = Rates(" tokens")
    rates.add("10.0.0.2", 1, 100, 1.0)
    rates.add("10.0.0.2", 1, 500, 2.0)
    assert str(rates) == "10.0.0.2: 1 x 200 tokens/s"


def test_many_nodes_are_counted() -> None:
    rates = Rates("w")
    for last in range(4):
        rates.add(f"10.0.0.{last}", 1, 1000, 1.0)
    assert str(rates) == "4 workers on 4 nodes, 1.00kw/s each"
