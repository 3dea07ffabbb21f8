"""Doctor: what it finds on this machine and on others, and that no token is ever in it.

Covers: cli/doctor.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as found_version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from conftest import Result
from hub import Answer, Hub, Request, client_of, serve

from loftq.verbs import doctor as doctors
from loftq.verbs.doctor import Finding, doctor

Run = Callable[..., Result]


class LoginHub(Hub):
    """A Hub that says whose token it is."""

    routes: ClassVar = [*Hub.routes, ("GET", "/api/whoami-v2", "_whoami")]

    def _whoami(self, request: Request) -> Answer:
        assert request.token in self.tokens
        body = {"name": "somebody", "type": "user", "auth": {"accessToken": {"role": "write"}}}
        return Answer(200, {"Content-Type": "application/json"}, json.dumps(body).encode())


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve(LoginHub()) as served, client_of(served.endpoint, tmp_path / "hf"):
        yield served


def finding(name: str) -> Finding:
    return next(found for found in doctor().findings if found.name == name)


def test_this_machine(run: Run) -> None:
    result = run("doctor")
    assert result.exit_code == 0
    for text in ("python", "torch", "bitsandbytes", "cpu", "accelerators", "disk of results", "Hub login"):
        assert text in result.stdout
    found = json.loads(run("doctor", "--json").stdout)
    assert found["healthy"]
    assert {"state": "ok", "name": "torch", "text": torch.__version__} in found["findings"]


def test_repacking_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what bitsandbytes says of the CPU."""
    found = finding("bitsandbytes on this CPU")
    assert found.state == ("note" if has_avx512bf16() else "ok")
    assert ("2078" in found.text) == bool(has_avx512bf16())
    monkeypatch.setattr(doctors, "_is_repacked", lambda *, guarded: not guarded)
    assert "support_avx512bf16_for_cpu = False" in finding("bitsandbytes on this CPU").text
    monkeypatch.setattr(doctors, "_is_repacked", lambda *, guarded: True)  # noqa: ARG005
    assert finding("bitsandbytes on this CPU").state == "FAIL"


def test_a_library_that_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    def version(name: str) -> str:
        if name in ("scipy", "gguf"):
            raise PackageNotFoundError(name)
        return "0.1" if name == "peft" else found_version(name)

    monkeypatch.setattr(doctors, "version", version)
    assert finding("scipy") == ("FAIL", "scipy", "not installed, pip install scipy>=1.11")
    assert finding("peft") == ("FAIL", "peft", "0.1, expected >=0.19: pip install -U 'peft'")
    assert finding("gguf").state == "note"
    assert "pip install loftq[gguf]" in finding("gguf").text
    assert run("doctor").exit_code == 1


def test_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(
        is_available=lambda: True, current_accelerator=lambda: torch.device("cuda"), device_count=lambda: 2
    )
    properties = SimpleNamespace(name="A card", total_memory=80 * 10**9)
    monkeypatch.setattr(torch, "accelerator", fake)
    monkeypatch.setattr(
        torch, "get_device_module", lambda _: SimpleNamespace(get_device_properties=lambda _: properties)
    )
    assert finding("cuda:1") == ("ok", "cuda:1", "A card, 80.0 GB of memory")
    monkeypatch.setattr(doctors.dispatch, "HAS_TRITON", False)
    assert finding("triton").state == "note"
    assert "pip install triton" in finding("triton").text


def test_disks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert finding("disk of results").state == "ok"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(doctors, "free_bytes", lambda _: 10**9)
    assert finding("disk of results").text == "model_zoo/loftq: only 1.0 GB free"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert finding("disk of results").text == f"model_zoo/loftq: {tmp_path} is not writable"


@pytest.mark.parametrize(
    ("token", "state", "text"),
    [
        (None, "note", "none: only public models can be read, and nothing can be pushed (log in with `hf auth login`)"),
        ("hf_good", "ok", "somebody, with a write token"),
        ("hf_stale", "FAIL", "the Hub refuses the token: log in again with `hf auth login`"),
        ("hf_wörse", "FAIL", "the Hub token contains invalid characters: copy it again"),
    ],
    ids=["none", "good", "stale", "strange"],  # a test's folder is named after it, and its path is in the findings
)
def test_login(token: str | None, state: str, text: str, hub: Hub, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    hub.tokens.add("hf_good")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    assert finding("Hub login") == (state, "Hub login", text)
    result = run("doctor")
    assert result.exit_code == (1 if state == "FAIL" else 0)
    assert token is None or token not in result.stdout + result.stderr


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    with client_of("http://127.0.0.1:9", tmp_path / "hf"):
        found: Any = finding("Hub login")
    assert found.state == "note"
    assert found.text.startswith("http://127.0.0.1:9 cannot be reached: ")
