"""Addresses where no cluster can be joined are refused at once."""

from __future__ import annotations

import ast
import importlib.util
import socket
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_ray
import pytest

from loftq.cluster import connection
from loftq.errors import OptionError


@pytest.fixture
def silent_server() -> Iterator[int]:
    """The port of a server that answers with a line of its own, as one of mail does."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            client, _ = server.accept()
            with client:
                client.sendall(b"220 mail is here\r\n")
                client.recv(64)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        thread.join(timeout=10)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("ray://127.0.0.1:10001", "expected HOST:PORT of a cluster that this machine belongs to"),
        ("127.0.0.1", "expected auto, or HOST:PORT"),
        ("127.0.0.1:70000", "expected auto, or HOST:PORT"),
        ("127.0.0.1:http", "expected auto, or HOST:PORT"),
        ("no host has this name:6379", "nothing listens there"),
    ],
)
def test_an_address_that_is_none(address: str, line: str) -> None:
    with pytest.raises(OptionError, match=line):
        connection._check_address(address)


def test_an_address_where_nothing_listens() -> None:
    with pytest.raises(OptionError, match=r"nothing listens there \(Connection refused\): start a cluster with"):
        connection._check_address(f"127.0.0.1:{free_port()}")


def test_an_address_where_another_program_listens(silent_server: int) -> None:
    with pytest.raises(OptionError, match="what listens there is not Ray"):
        connection._check_address(f"127.0.0.1:{silent_server}")


def test_without_ray_a_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(OptionError, match=r"pip install 'loftq\[cluster\]'"):
        connection.import_ray()


class Started:
    """The part of Ray that connects. `joined` are the arguments of each `init`."""

    exceptions = SimpleNamespace(RayError=fake_ray.RayError)

    def __init__(self) -> None:
        self.joined: list[dict[str, Any]] = []

    def is_initialized(self) -> bool:
        return False

    def init(self, **arguments: Any) -> None:
        self.joined.append(arguments)

    def shutdown(self) -> None:
        self.joined.append({})


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    ray = Started()
    monkeypatch.setattr(connection, "import_ray", lambda: ray)
    monkeypatch.setattr(connection, "_silenced", nullcontext)
    monkeypatch.setattr(connection, "_bootstrap_address", lambda: "")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return ray


def test_auto_starts_a_cluster_where_none_is_found(started: Started) -> None:
    with connection.connected("auto", 3):
        assert [(one["address"], one["num_cpus"]) for one in started.joined] == [("local", 3)]
    assert started.joined[-1] == {}


def test_auto_does_not_wait_for_a_cluster_that_was_killed(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_bootstrap_address", lambda: f"127.0.0.1:{free_port()}")
    with connection.connected("auto"):
        assert started.joined[0]["address"] == "local"


def test_auto_joins_what_ray_start_has_started(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_bootstrap_address", lambda: "10.0.0.2:6379")
    monkeypatch.setattr(connection, "_check_address", lambda _: None)
    with connection.connected("auto"):
        assert started.joined[0]["address"] == "auto"


def test_auto_is_the_address_of_the_environment(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with pytest.raises(OptionError, match="nothing listens there"), connection.connected("auto"):
        pass
    assert started.joined == []


def test_what_ray_says_of_a_cluster_is_one_line(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray refuses a cluster of another version of Ray or Python."""

    def refuse(**_: Any) -> None:
        raise RuntimeError("Version mismatch: the cluster was started with:\n    Ray: 2.1.0\n    Python: 3.12.1")

    monkeypatch.setattr(started, "init", refuse)
    line = r"^--cluster auto: Ray cannot be joined there: Version mismatch.*Ray: 2.1.0.*RAY_AUTH_MODE=token\)$"
    with pytest.raises(OptionError, match=line), connection.connected("auto"):
        pass


def test_ray_is_imported_in_functions_only() -> None:
    """A file of loftq that imported it at its head would import it without being asked for."""
    for path in (Path(connection.__file__).parent.parent).rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not {name.partition(".")[0] for name in names} & {"ray", "threadpoolctl"}, path
