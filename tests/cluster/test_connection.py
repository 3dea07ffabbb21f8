"""Addresses where no cluster can be joined are refused at once."""

from __future__ import annotations

import importlib.util
import socket
import threading
from collections.abc import Iterator

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
