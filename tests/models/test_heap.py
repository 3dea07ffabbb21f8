"""Pages of their own for large blocks. Oracle: the resident memory of a process, as Linux counts it."""

from __future__ import annotations

import sys

import pytest
from processes import run_python

_PROGRAM = """
import sys, torch
from contextlib import nullcontext
from loftq.models.heap import own_pages, return_freed

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def block():
    return torch.ones(2_000_000)  # 8 MB

torch.ones(7_000_000)  # freed: from here on, glibc serves blocks of up to 28 MB from its heap
with own_pages(torch.device(sys.argv[1])):
    before = resident()
    blocks = [block() for _ in range(40)]
    del blocks[:-1]  # one stays at the end of the heap
    print((resident() - before) // 8_000_000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is asked")
def test_what_was_freed_is_returned() -> None:
    """On another device than the CPU nothing changes, and what was freed stays in the process."""
    left = {device: int(run_python(_PROGRAM, device).stdout) for device in ("cpu", "meta")}
    assert left["cpu"] <= 2
    assert left["meta"] >= 30


_HOLES = """
import sys, torch
from loftq.models.heap import return_freed

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

before = resident()
blocks = [torch.ones(12_500) for _ in range(1600)]  # 50 kB each, from the heap
del blocks[:-1]
return_freed(torch.device(sys.argv[1]))
print((resident() - before) // 8_000_000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is asked")
def test_holes_are_returned() -> None:
    left = {device: int(run_python(_HOLES, device).stdout) for device in ("cpu", "meta")}
    assert left["cpu"] <= 2
    assert left["meta"] >= 8
