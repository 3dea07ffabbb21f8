"""The rates beside the progress bar."""

from __future__ import annotations

from loftq.cluster.rates import Rates


def test_the_workers_of_a_node_stand_together() -> None:
    rates = Rates(dict.fromkeys("abcd", 1000))
    assert rates.add("a", "10.0.0.2", 1, 2.0) == "10.0.0.2: 1 x 500w/s"
    assert rates.add("b", "10.0.0.2", 2, 1.0) == "10.0.0.2: 2 x 750w/s"
    assert rates.add("c", "10.0.0.3", 1, 1.0) == "10.0.0.2: 2 x 750w/s, 10.0.0.3: 1 x 1.00kw/s"


def test_many_nodes_are_counted() -> None:
    rates = Rates({"a": 1000})
    shown = [rates.add("a", f"10.0.0.{last}", 1, 1.0) for last in range(4)]
    assert shown[-1] == "4 workers on 4 nodes, 1.00kw/s each"
