"""`loftq doctor`: checks the libraries, devices, disks and Hub login of this machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packaging.requirements import Requirement

from loftq.core.kernels import dispatch
from loftq.display import columns, one_line, size
from loftq.errors import OptionError
from loftq.formats.space import free_bytes
from loftq.hub.errors import checked_token
from loftq.models.loading import guard_cpu
from loftq.planning.settings import SAVE_DIR

FINE, WORSE, WRONG = "ok", "note", "FAIL"
_EXTRAS = {"data": "data sets of the Hub", "gguf": "`loftq merge --to gguf-q4_1`", "report": "`loftq report`"}
_LITTLE = 10 * 10**9  # bytes; the download and the result of a 7B model need more


class Finding(NamedTuple):
    """The result of one check: its state, and a text that says what to do if something is wrong."""

    state: str
    name: str
    text: str


@dataclass(frozen=True)
class Diagnosis:
    """The results of all checks."""

    findings: Sequence[Finding]

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong."""
        return all(finding.state != WRONG for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {"healthy": self.healthy, "findings": [finding._asdict() for finding in self.findings]}

    def table(self) -> str:
        """The results as a table for a person."""
        return columns([(f"{state:<{len(WRONG)}}", name, text) for state, name, text in self.findings])


def doctor() -> Diagnosis:
    """Check the libraries, the devices, bitsandbytes on this CPU, the disks, and the login to the Hub.

    Nothing is changed. If there is a token, the Hub is asked for its owner; the token itself is in no finding.
    """
    return Diagnosis([*_libraries(), *_devices(), _repacking(), *_disks(), _login()])


def _libraries() -> Iterator[Finding]:
    yield Finding(FINE, "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    needed = [Requirement(text) for text in requires("loftq") or ()]
    for requirement in needed:
        if _is_wanted(requirement, ""):
            yield _library(requirement)
    for extra, use in _EXTRAS.items():
        for requirement in needed:
            if _is_wanted(requirement, extra) and not _is_wanted(requirement, ""):
                yield _library(requirement, f"for {use}: pip install loftq[{extra}]")


def _is_wanted(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _library(requirement: Requirement, use: str | None = None) -> Finding:
    """Check that a library meets its requirement. One with a `use` is optional."""
    name = requirement.name
    try:
        installed = version(name)
    except PackageNotFoundError:
        return Finding(WORSE if use else WRONG, name, f"not installed, {use or f'pip install {requirement}'}")
    if not requirement.specifier.contains(installed, prereleases=True):
        return Finding(WRONG, name, f"{installed}, expected {requirement.specifier}: pip install -U {name!r}")
    return Finding(FINE, name, installed)


def _devices() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    kind, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    yield Finding(FINE, "cpu", f"{cores} cores, {kind}, {size(memory)} of memory; torch uses {threads} threads")
    available = hasattr(torch, "accelerator") and torch.accelerator.is_available()  # since torch 2.6
    accelerator = torch.accelerator.current_accelerator() if available else None
    if accelerator is None:
        yield Finding(FINE, "accelerators", "torch finds none: everything runs on the CPU")
        return
    device: Any = torch.get_device_module(accelerator)
    for index in range(torch.accelerator.device_count()):
        properties = device.get_device_properties(index) if hasattr(device, "get_device_properties") else None
        text = f"{properties.name}, {size(properties.total_memory)} of memory" if properties else "available"
        yield Finding(FINE, f"{accelerator.type}:{index}", text)
    if accelerator.type in dispatch.TRITON and not dispatch.HAS_TRITON:
        yield Finding(
            WORSE,
            "triton",
            "not installed, so that the GPU kernels of loftq are replaced by slower code: pip install triton",
        )


def _repacking() -> Finding:
    """Try the 4-bit linear of bitsandbytes in evaluation mode, which changes its weight on some CPUs."""
    name = "bitsandbytes on this CPU"
    try:
        if not _is_repacked(guarded=False):
            return Finding(FINE, name, "4-bit weights stay unchanged")
        prevented = not _is_repacked(guarded=True)
    except (ImportError, RuntimeError, AttributeError) as error:
        return Finding(WRONG, name, f"does not run ({one_line(error)}): install it again")
    if not prevented:
        return Finding(
            WRONG,
            name,
            "repacks 4-bit weights in evaluation mode, which cannot be prevented: train and merge on another machine",
        )
    return Finding(
        WORSE,
        name,
        "repacks 4-bit weights at the first evaluation, so that gradients and merges are wrong after it (its issue "
        "2078): the loaders of loftq prevent that; in other programs set support_avx512bf16_for_cpu = False on every "
        "Linear4bit",
    )


@torch.no_grad()
def _is_repacked(*, guarded: bool) -> bool:
    """Whether a forward pass in evaluation mode changes the stored weight of a 4-bit linear."""
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu").eval()
    if guarded:
        guard_cpu(layer)
    before = layer.weight.data.clone()
    layer(torch.ones(1, 64, dtype=torch.bfloat16))
    return not torch.equal(layer.weight.data, before)


def _disks() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for name, folder in (("disk of results", Path(SAVE_DIR)), ("disk of downloads", Path(HF_HUB_CACHE))):
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
        free = free_bytes(existing)
        if not os.access(existing, os.W_OK):
            yield Finding(WORSE, name, f"{folder}: {existing} is not writable")
        elif free < _LITTLE:
            yield Finding(WORSE, name, f"{folder}: only {size(free)} free")
        else:
            yield Finding(FINE, name, f"{folder}: {size(free)} free")


def _login() -> Finding:
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    name = "Hub login"
    try:
        checked_token(None)
        if get_token() is None:
            return Finding(
                WORSE,
                name,
                "none: only public models can be read, and nothing can be pushed (log in with `hf auth login`)",
            )
        account = HfApi().whoami()
    except OptionError as error:
        return Finding(WRONG, name, str(error))
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            return Finding(WRONG, name, "the Hub refuses the token: log in again with `hf auth login`")
        return Finding(
            WORSE, name, f"{constants.ENDPOINT} answers with status {error.response.status_code}: try again later"
        )
    except (HTTPError, OSError) as error:
        return Finding(WORSE, name, f"{constants.ENDPOINT} cannot be reached: {one_line(error)}")
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role", "unknown")
    return Finding(FINE, name, f"{account['name']}, with a {role} token")
