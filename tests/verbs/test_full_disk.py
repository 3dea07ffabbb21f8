"""A full or read-only disk: one line that says so and what to do; nothing else touched; --resume goes on.

Covers: loftq/formats/space.py.

Real disks where the system lets this user mount one: a tmpfs of a few pages in a mount namespace of another
process. Elsewhere, and for what no tmpfs does, the system call is made to fail in this process. The oracle
for a resumed run is an undisturbed one to the same path: every file's SHA-256.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from folders import Files, hashes, opens
from processes import start_python

from loftq.artifacts import staging
from loftq.formats import space

PARTIAL = ".loftq-partial"
SETTINGS = ("--rank", 4, "--iter", 1, "--max-shard-size", "60KB", "--workers", 1, "--quiet")
PAGE = resource.getpagesize()


class Ended(NamedTuple):
    """How a command ended."""

    exit_code: int
    stderr: str


def check_told(ended: Any, *words: object) -> None:
    """Exit code 1 and one line with these words in it."""
    assert ended.exit_code == 1, ended
    assert ended.stderr.startswith("Error: "), ended
    assert ended.stderr.count("\n") == 1, ended
    for word in words:
        assert str(word) in ended.stderr, ended


# Real disks


class Disk:
    """A tmpfs in another process, which runs commands on it."""

    def __init__(self, process: Any, folder: Path, model: Path) -> None:
        self.process = process
        self.folder = folder
        self.out = folder / "out"
        self.command = ("quantize", model, "--output", self.out, *SETTINGS)
        self.mounted = False

    def ask(self, task: str, *arguments: object) -> Any:
        """Do one of `TASKS` over there."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([task, *map(str, arguments)]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def mount(self, options: str) -> None:
        """A fresh disk, e.g. `size=64k`."""
        if self.mounted:
            assert self.ask("system", "umount", self.folder) == 0, "a file was left open"
        self.mounted = self.ask("system", "mount", "-t", "tmpfs", "-o", options, "tmpfs", self.folder) == 0
        assert self.mounted

    def change(self, options: str) -> None:
        """Make the disk larger, or read-only."""
        assert self.ask("system", "mount", "-o", f"remount,{options}", self.folder) == 0

    def run(self, *flags: object) -> Ended:
        """`loftq quantize` onto the disk."""
        return Ended(*self.ask("loftq", *self.command, *flags))

    def files(self) -> Files:
        """All that is in the output folder."""
        return dict(self.ask("hashes", self.out))

    def opens(self) -> bool:
        """Whether the output is a complete artifact."""
        return bool(self.ask("opens", self.out))


def loftq(*arguments: str) -> tuple[int, str]:
    from loftq_cli.main import main

    code, stderr = 0, io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
        try:
            main(list(arguments))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return code, stderr.getvalue()


def unchecked_loftq(*arguments: str) -> tuple[int, str]:
    """The same as if the check before the work had passed, and the space had gone during the work."""
    free, space.free_bytes = space.free_bytes, lambda _: 1 << 60
    try:
        return loftq(*arguments)
    finally:
        space.free_bytes = free


TASKS: dict[str, Callable[..., Any]] = {
    "loftq": unchecked_loftq,
    "checked": loftq,
    "system": lambda *command: subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode,
    "hashes": lambda folder: hashes(Path(folder)),
    "opens": lambda folder: opens(Path(folder)),
    "used": lambda folder: (lambda disk: (disk.f_blocks - disk.f_bfree) * disk.f_bsize)(os.statvfs(folder)),
}


@pytest.fixture(scope="module")
def disk(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no right to mount a disk here")
    process = start_python(f"import {__name__}; {__name__}.serve()", pipes=True, seconds=0)
    yield Disk(process, tmp_path_factory.mktemp("disk"), pico)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 0


@pytest.fixture(scope="module")
def whole(disk: Disk) -> tuple[Files, int]:
    """The files of a run with room to spare, and the bytes that they take on the disk."""
    disk.mount("size=2m")
    ended = disk.run()
    assert ended.exit_code == 0, ended
    return disk.files(), int(disk.ask("used", disk.folder))


def test_a_disk_that_is_too_small(disk: Disk, whole: tuple[Files, int]) -> None:
    """Every stage runs out of space: making the folder, reserving, noting, the small files."""
    expected, needed = whole
    told = set()
    for pages in [1, 2, 3, *range(8, needed // PAGE - 12, 8), *range(needed // PAGE - 12, needed // PAGE)]:
        disk.mount(f"size={pages * PAGE}")
        ended = disk.run()
        check_told(ended, disk.out, "the disk is full", "free some space")
        assert not disk.opens()
        told.add(ended.stderr.partition("free some space")[2])
        disk.change("size=2m")
        resumed = disk.run("--resume")
        assert resumed.exit_code == 0, (pages, resumed)
        assert disk.files() == expected, pages
    assert ", then run again with --resume\n" in told


def test_the_space_is_checked_before_the_work(disk: Disk, whole: tuple[Files, int], tmp_path: Path) -> None:
    """Quantizing and merging are refused before they write anything; oracle: the space that a whole run takes."""
    disk.mount(f"size={whole[1] // 2}")
    small = Ended(*disk.ask("checked", *disk.command))
    check_told(small, disk.out, "the disk is too full", "are needed and", "free some space, or name another --output")
    assert disk.files() == {}
    check_told(disk.run(), "the disk is full")  # some of it is there now, and counts as free
    disk.change(f"size={whole[1] + 8 * PAGE}")
    resumed = Ended(*disk.ask("checked", *disk.command, "--resume"))
    assert resumed.exit_code == 0, resumed
    assert Ended(*disk.ask("loftq", *disk.command[:2], "--output", tmp_path / "made", *SETTINGS)).exit_code == 0
    merge = ("merge", tmp_path / "made", "--to", "bf16", "--output", disk.folder / "merged", "--no-check", "--quiet")
    check_told(Ended(*disk.ask("checked", *merge)), disk.folder / "merged", "the disk is too full")


def test_a_disk_too_small_for_statistics_or_a_training(disk: Disk, whole: tuple[Files, int], tmp_path: Path) -> None:
    """What calibration keeps, and what a training leaves: each error names the option that chose the folder."""
    del whole
    disk.mount("size=16k")
    text = [*("--calibration", "default", "--calibration-tokens", 4096, "--sequence-length", 64), "--refine", 0]
    made = ("quantize", disk.command[1], "--output", tmp_path / "made", *SETTINGS)
    statistics = disk.folder / "statistics"
    ended = Ended(*disk.ask("loftq", *made, *text, "--statistics", statistics))
    check_told(ended, statistics, "the disk is full", "name another --statistics")
    assert Ended(*disk.ask("loftq", *made)).exit_code == 0
    (tmp_path / "sums.jsonl").write_text(3 * '{"prompt": "1+1", "response": "2"}\n', encoding="utf-8")
    rest = ("--data", tmp_path / "sums.jsonl", "--max-steps", 2, "--quiet", "--set", "save_strategy=no")
    ended = Ended(*disk.ask("loftq", "train", tmp_path / "made", "--output", disk.out, *rest))
    assert ended.exit_code == 1
    assert f"cannot write {disk.out}: the disk is full: free some space, or name another --output" in ended.stderr


def test_a_disk_without_room_for_names(disk: Disk, whole: tuple[Files, int]) -> None:
    """No inode is left for the folder, the journal, a shard, a config."""
    for inodes in range(1, 16, 2):
        disk.mount(f"size=2m,nr_inodes={inodes}")
        check_told(disk.run(), disk.out, "the disk is full", "free some space")
        assert not disk.opens()
        disk.change("nr_inodes=100")
        assert disk.run("--resume").exit_code == 0
        assert disk.files() == whole[0]


def test_overwriting_without_room_for_both(disk: Disk, whole: tuple[Files, int]) -> None:
    """The artifact that is there stays whole until the new one is."""
    expected, needed = whole
    disk.mount("size=2m")
    assert disk.run("--seed", 1, "--rank", 2).exit_code == 0
    older = disk.files()
    disk.change(f"size={needed + needed // 2}")
    check_told(disk.run("--overwrite"), "the disk is full", "--resume")
    left = disk.files()
    assert older.items() <= left.items()
    assert all(name.startswith(PARTIAL) for name in set(left) - set(older))
    assert disk.opens()
    disk.change("size=2m")
    assert disk.run("--resume").exit_code == 0
    assert disk.files() == expected


def test_a_read_only_disk(disk: Disk) -> None:
    disk.mount("size=2m,ro")
    check_told(disk.run(), disk.out, "read-only", "another --output")
    assert disk.files() == {}


def test_a_read_only_disk_with_an_unfinished_run(disk: Disk, whole: tuple[Files, int]) -> None:
    disk.mount(f"size={whole[1] // 2}")
    check_told(disk.run(), "the disk is full")
    disk.change("size=2m,ro")
    before = disk.files()
    check_told(disk.run("--resume"), "read-only", "make it writable, then run again with --resume")
    check_told(disk.run("--overwrite"), "read-only", "make it writable, then run again with --resume")
    assert disk.files() == before
    disk.change("size=2m,rw")
    assert disk.run("--resume").exit_code == 0
    assert disk.files() == whole[0]


def test_a_read_only_disk_with_an_artifact(disk: Disk, whole: tuple[Files, int]) -> None:
    disk.mount("size=2m")
    assert disk.run().exit_code == 0
    disk.change("ro")
    check_told(disk.run("--overwrite"), "read-only")
    assert disk.files() == whole[0]
    assert disk.opens()


# Failing system calls


@pytest.fixture(autouse=True)
def _noted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "EVERY", 0)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results" / "out"


@pytest.fixture
def quantize(run: Callable[..., Any], pico: Path, out: Path) -> Callable[..., Any]:
    return lambda *flags: run("quantize", pico, "--output", out, *SETTINGS, *flags)


@pytest.fixture
def expected(quantize: Callable[..., Any], out: Path) -> Files:
    assert quantize().exit_code == 0
    files = hashes(out)
    shutil.rmtree(out.parent)
    return files


def fail(monkeypatch: pytest.MonkeyPatch, owner: Any, call: str, number: int, error: int, part: bool = False) -> None:
    """Make a call fail from its `number`-th use on; with `part`, after it has written a half."""
    original = getattr(owner, call)
    uses = 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal uses
        uses += 1
        if uses < number:
            return original(*arguments, **options)
        if part and uses == number:
            descriptor, data, *rest = arguments
            return original(descriptor, memoryview(data)[: len(data) // 2], *rest)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(owner, call, failing)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errno.ENOSPC, ["the disk is full", "free some space"]),
        (errno.EDQUOT, ["quota", "free some space"]),
        (errno.EROFS, ["read-only", "make it writable"]),
        (errno.EACCES, ["permission denied", "make it writable"]),
        (errno.EPERM, ["permission denied", "make it writable"]),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
@pytest.mark.parametrize(
    ("owner", "call", "number"),
    [
        (Path, "mkdir", 1),
        (os, "posix_fallocate", 1),
        (os, "posix_fallocate", 3),
        (os, "pwrite", 30),
        (os, "write", 1),
        (os, "write", 9),
        (Path, "write_text", 2),
        (Path, "replace", 1),
        (Path, "replace", 7),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_call_that_fails(
    owner: Any,
    call: str,
    number: int,
    error: int,
    words: list[str],
    quantize: Callable[..., Any],
    expected: Files,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        fail(patch, owner, call, number, error)
        ended = quantize()
    begun = call != "mkdir"
    check_told(ended, out, *words, "--resume" if begun else "another --output")
    assert not opens(out)
    assert quantize("--resume").exit_code == 0
    assert hashes(out) == expected


@pytest.mark.parametrize(("call", "number"), [("write", 1), ("write", 2), ("write", 9), ("pwrite", 30)])
def test_a_disk_that_takes_a_half(
    call: str,
    number: int,
    quantize: Callable[..., Any],
    expected: Files,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is written in part is no error yet: the rest is, and what was cut short is written again."""
    with monkeypatch.context() as patch:
        fail(patch, os, call, number, errno.ENOSPC, part=True)
        check_told(quantize("--workers", 3), "the disk is full", "--resume")
    assert quantize("--resume").exit_code == 0
    assert hashes(out) == expected


def test_a_note_after_one_that_was_cut_short(
    quantize: Callable[..., Any], expected: Files, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Space comes back while another worker is still running: its note follows half a line."""
    write, uses = os.write, 0

    def once_full(descriptor: int, data: bytes) -> int:
        nonlocal uses
        uses += 1
        if uses == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[: len(data) // 2] if uses == 4 else data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", once_full)
        check_told(quantize("--workers", 3), "the disk is full", "--resume")
    assert quantize("--resume").exit_code == 0
    assert hashes(out) == expected


def test_an_error_of_another_kind_is_not_hidden(
    quantize: Callable[..., Any], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, os, "posix_fallocate", 1, errno.EBADF)
    with pytest.raises(OSError, match="Bad file descriptor"):
        quantize()
    assert not opens(out)


def test_a_file_larger_than_allowed(quantize: Callable[..., Any], out: Path) -> None:
    """A real limit. What the message advises works."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        check_told(quantize(), "larger than allowed", "--overwrite", "--max-shard-size", "another --output")
        assert not opens(out)
        assert quantize("--overwrite", "--max-shard-size", "30KB").exit_code == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert opens(out)


def test_a_path_under_a_file(run: Callable[..., Any], pico: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    ended = run("quantize", pico, "--output", tmp_path / "file" / "out", *SETTINGS)
    check_told(ended, tmp_path / "file" / "out", "a part of the path is a file", "another --output")
    assert hashes(tmp_path) == {"file": hashlib.sha256(b"mine").hexdigest()}


def test_a_name_that_is_too_long(run: Callable[..., Any], pico: Path, tmp_path: Path) -> None:
    ended = run("quantize", pico, "--output", tmp_path / ("x" * 300), *SETTINGS)
    check_told(ended, "the name is too long", "another --output")
    assert hashes(tmp_path) == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not hold back root")
@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_folder_without_permission(mode: int, run: Callable[..., Any], pico: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=mode)
    ended = run("quantize", pico, "--output", closed / "out", *SETTINGS)
    closed.chmod(0o755)
    check_told(ended, closed / "out", "permission denied", "another --output")
    assert hashes(closed) == {}


def unshare() -> None:
    """Give this process namespaces of its own for users and mounts, as `unshare -rm` does."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    new_users, new_mounts, recursive, private = 0x10000000, 0x20000, 1 << 14, 1 << 18  # of sched.h and sys/mount.h
    if libc.unshare(new_users | new_mounts):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(text)
    if libc.mount(b"none", b"/", None, recursive | private, None):
        raise OSError(ctypes.get_errno(), "mount")


def serve() -> None:
    """In a mount namespace: do the tasks that come on stdin, one a line."""
    unshare()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what is printed by the way must not mix with the answers
    for line in sys.stdin:
        task, *arguments = json.loads(line)
        answers.write(json.dumps(TASKS[task](*arguments)) + "\n")
