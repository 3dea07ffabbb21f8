"""Connects to Ray: joins a cluster, or starts one on this machine that ends with the connection.

Nothing else of this package imports Ray, and this file does so only when a cluster was asked for.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loftq.display import one_line
from loftq.errors import OptionError

AUTO = "auto"
_SECONDS = 10.0  # to wait for an answer of an address
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # of gRPC, with empty settings
_SETTINGS_FRAME = 4  # the type of the frame with which a gRPC server answers: the fourth byte
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to anybody
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
}


def import_ray() -> Any:
    """The module `ray`. Raises OptionError if it is not installed."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if not all(map(importlib.util.find_spec, ("ray", "threadpoolctl"))):
        raise OptionError("--cluster needs Ray, which is not installed: pip install 'loftq[cluster]'")
    import ray

    return ray


@contextmanager
def connected(address: str, cores: int | None = None) -> Iterator[Any]:
    """Ray, connected to the cluster at an address, HOST:PORT. It is disconnected at the end.

    `auto` is the cluster that RAY_ADDRESS names, or the one that `ray start` has started on this machine, or else a new
    one with all GPUs and `cores` of the CPU, which ends with the connection. A connection that the program has already
    is used and kept. Raises OptionError for an address where no cluster can be joined.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == AUTO:
        address = os.environ.get("RAY_ADDRESS") or AUTO
    with _silenced():
        try:
            if address != AUTO:
                _check_address(address)
            with _no_stderr():
                if address != AUTO:
                    ray.init(address=address, **quiet)
                elif _is_started_here():
                    ray.init(address=AUTO, **quiet)  # by which Ray also finds the token
                else:
                    ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
        except (RuntimeError, ValueError, OSError, SystemExit, ray.exceptions.RayError) as error:
            raise OptionError(
                f"--cluster {address}: Ray cannot be joined there: {one_line(error, 300)} (if the cluster asks for a "
                "token, set RAY_AUTH_MODE=token)"
            ) from error
        try:
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def _silenced() -> Iterator[None]:
    """Keep Ray from printing the logs of a process that died to stdout, where the table of a command stands."""
    from ray._private import worker

    name = "print_to_stdstream"
    printing = getattr(worker, name, None)
    setattr(worker, name, lambda *_, **__: None)
    try:
        yield
    finally:
        if printing is not None:
            setattr(worker, name, printing)


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Keep Ray's compiled part from writing a line a second to stderr while it cannot connect."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def _is_started_here() -> bool:
    """Whether the cluster that `ray start` has started on this machine is still there.

    Ray's own `auto` would also join what another program has started for itself, which ends with that program, and
    would wait for minutes for a cluster that was killed.
    """
    address = _bootstrap_address()
    try:
        if address:
            _check_address(address)
    except OptionError:
        return False
    return bool(address)


def _bootstrap_address() -> str:
    """The address that `ray start` has left on this machine, or an empty one."""
    from ray._private import services

    return str(services.find_bootstrap_address(None) or "")


def _check_address(address: str) -> None:
    """Raise OptionError unless a gRPC server listens at an address: Ray itself would try for minutes."""
    if address.startswith("ray://"):
        raise OptionError(
            f"--cluster {address}: expected HOST:PORT of a cluster that this machine belongs to: run the command on a "
            "node of the cluster, for example with `ray job submit`"
        )
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or not 0 < int(port) < 65536:
        raise OptionError(f"--cluster {address}: expected auto, or HOST:PORT as `ray start --head` prints it")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS) as connection:
            connection.sendall(_GREETING)
            answer = connection.recv(9)
    except TimeoutError:
        answer = b""
    except OSError as error:
        raise OptionError(
            f"--cluster {address}: nothing listens there ({error.strerror or one_line(error)}): start a cluster with "
            "`ray start --head`, or use --cluster auto"
        ) from error
    if not _is_encrypted() and (len(answer) < 4 or answer[3] != _SETTINGS_FRAME):
        raise OptionError(
            f"--cluster {address}: what listens there is not Ray: expected the HOST:PORT that `ray start --head` prints"
        )


def _is_encrypted() -> bool:
    """Whether Ray is set up to speak TLS, so that its greeting cannot be read."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
