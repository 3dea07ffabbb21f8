"""Killed runs: an unfinished folder never passes for a whole one, and --resume ends with the same bytes.

The oracle is always an undisturbed run to the same path: every file's SHA-256. Commands run in forks of one
server process that has imported everything (`serve`, below), with each system call that changes the output
counted, so that a run can be killed before, or in the middle of, exactly the n-th.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from folders import Files, hashes, opens
from power_cut import ForgetfulDisk
from processes import start_python

PARTIAL = ".loftq-partial"
SETTINGS = ("--rank", 4, "--iter", 2, "--max-shard-size", "60KB", "--quiet")
Command = tuple[object, ...]


@dataclass(frozen=True)
class Event:
    """A system call on the output: its name, the file relative to the output, and how many came before."""

    number: int
    call: str
    file: str


@dataclass(frozen=True)
class Ended:
    """A command that ended or, with `stopped`, that waits for SIGCONT. A negative exit code is a signal."""

    exit_code: int
    stderr: str
    events: tuple[Event, ...]
    stopped: int | None


Undisturbed = tuple[Files, tuple[Event, ...]]


class Server:
    """The side of the tests: runs `loftq` commands in forks of a prepared process, one at a time."""

    def __init__(self, process: Any, scratch: Path) -> None:
        self.process = process
        self.scratch = scratch

    def run(
        self,
        *arguments: object,
        output: Path,
        at: int = 0,
        send: int = signal.SIGKILL,
        torn: bool = False,
        cut: int | None = None,
    ) -> Ended:
        """Run a command; before its call number `at` on `output`, or after half of it, it gets a signal.

        With the seed `cut`, the power is cut at that call, or at the end if `at` is -1.
        """
        job = {"arguments": [str(argument) for argument in arguments], "output": str(output)}
        return self.ask(job | {"at": at, "send": int(send), "torn": torn, "cut": cut})

    def ask(self, job: dict[str, Any]) -> Ended:
        """Send a job and read what became of it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        trace, stderr = self.scratch / "trace", self.scratch / "stderr"
        self.process.stdin.write(json.dumps({**job, "trace": str(trace), "stderr": str(stderr)}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        events = tuple(Event(*json.loads(line)) for line in trace.read_text().splitlines())
        return Ended(answer["exit_code"], stderr.read_text(), events, answer["stopped"])


@pytest.fixture(scope="module")
def server(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    code = f"import sys, {__name__}; {__name__}.serve(sys.argv[1])"
    process = start_python(code, pico, env=environment, pipes=True, seconds=0)
    yield Server(process, tmp_path_factory.mktemp("server"))
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 0


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one path that all runs write to: the adapter's config names it."""
    return tmp_path_factory.mktemp("runs") / "out"


@pytest.fixture(autouse=True)
def _fresh(out: Path) -> Iterator[None]:
    yield
    shutil.rmtree(out, ignore_errors=True)


@pytest.fixture(scope="module")
def command(pico: Path, out: Path) -> Command:
    return ("quantize", pico, "--output", out, *SETTINGS, "--workers", 1)


@pytest.fixture(scope="module")
def undisturbed(server: Server, command: Command, out: Path) -> Undisturbed:
    """The files of a run that nothing happened to, and its system calls."""
    ended = server.run(*command, output=out)
    assert ended.exit_code == 0, ended.stderr
    files = hashes(out)
    assert {"loftq.json", "config.json", "model.safetensors.index.json", "loftq_init/adapter_config.json"} < set(files)
    shutil.rmtree(out)
    return files, ended.events


def stock_loads(folder: Path) -> bool:
    """Whether transformers takes the folder for a model."""
    from transformers import AutoModelForCausalLM

    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError):
        return False
    return True


def backbone(files: Files) -> Files:
    """Of a folder's files those that transformers loads the model from."""
    return {
        name: digest
        for name, digest in files.items()
        if "/" not in name and (name.startswith("model") or name == "config.json")
    }


def check_unfinished(out: Path, new: Files, old: Files | None = None) -> None:
    """What is left of a killed run loads only where all of it is in place already.

    `config.json` comes after the weights and goes before them, `loftq.json` comes last: where one is, all that
    it stands for is, so that not even a loader that looks at nothing else takes a part for the whole.
    """
    own = {name: digest for name, digest in hashes(out).items() if not name.startswith(PARTIAL)}
    whole = [new] if old is None else [new, old]
    if opens(out):
        assert any(full.items() <= own.items() for full in whole)
    if "config.json" in own or stock_loads(out):
        assert any(backbone(full) == backbone(own) for full in whole)
    if own.get("loftq.json") == new["loftq.json"]:
        assert new.items() <= own.items()


def stages(events: Sequence[Event]) -> dict[str, list[Event]]:
    """An undisturbed run's calls by what the run was doing."""
    notes = [event.number for event in events if event.call == "write" and event.file.endswith("journal.jsonl")]
    headers = [event.number for event in events if event.call == "ftruncate" and event.file.endswith(".safetensors")]
    small = [event.number for event in events if event.call in ("write_text", "copyfile")]
    begun, ended, finished = max(headers) + 1, max(n for n in notes if n < min(small)), max(small)
    found: dict[str, list[Event]] = {"reserving": [], "solving": [], "finishing": [], "publishing": []}
    for event in events:
        if event.number <= begun:
            found["reserving"].append(event)
        elif event.number <= ended:
            found["solving"].append(event)
        else:
            found["finishing" if event.number <= finished else "publishing"].append(event)
    return found


def tensor_writes(events: Sequence[Event]) -> list[Event]:
    """The calls that write a tensor's bytes or note it, of an undisturbed run."""
    return stages(events)["solving"]


def resume(server: Server, command: Sequence[object], out: Path, expected: Files, where: str) -> None:
    resumed = server.run(*command, "--resume", output=out)
    assert resumed.exit_code == 0, f"{where}: {resumed.stderr}"
    assert hashes(out) == expected, where
    assert not (out / PARTIAL).exists(), where


def kill_and_resume(
    server: Server,
    command: Sequence[object],
    out: Path,
    event: Event,
    expected: Files,
    run: Callable[..., Any],
    torn: bool = False,
) -> None:
    """Kill at `event`, look at what is left, be told of --resume, resume."""
    shutil.rmtree(out, ignore_errors=True)
    where = f"killed {'inside' if torn else 'before'} {event}"
    killed = server.run(*command, output=out, at=event.number, torn=torn)
    assert killed.exit_code == -signal.SIGKILL, where
    check_unfinished(out, expected)
    if (out / PARTIAL / "journal.jsonl").exists():
        again = run(*command)
        assert again.exit_code == 1, where
        assert "--resume" in again.stderr, where
        assert again.stderr.count("\n") == 1, where
    if hashes(out) != expected:
        resume(server, command, out, expected, where)


@pytest.mark.parametrize("stage", ["reserving", "solving", "finishing", "publishing"])
def test_killed_before_a_system_call(
    stage: str, server: Server, command: Command, out: Path, undisturbed: Undisturbed, run: Callable[..., Any]
) -> None:
    """At some of each stage, the last ones among them; `test_killed_at_every_system_call` is slow."""
    expected, events = undisturbed
    chosen = stages(events)[stage]
    assert len(chosen) >= 7
    for event in [*chosen[: -2 : max(len(chosen) // 3, 1)], chosen[-1]]:
        kill_and_resume(server, command, out, event, expected, run)


@pytest.mark.parametrize("call", ["pwrite", "write", "write_text", "copyfile"])
def test_killed_inside_a_write(
    call: str, server: Server, command: Command, out: Path, undisturbed: Undisturbed, run: Callable[..., Any]
) -> None:
    """Half of the bytes are there: of a shard's header, of a tensor, of a line of the journal, of a config."""
    expected, events = undisturbed
    chosen = [event for event in events if event.call == call]
    for event in {chosen[0], chosen[len(chosen) // 2], chosen[-1]}:
        kill_and_resume(server, command, out, event, expected, run, torn=True)


@pytest.mark.slow
@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_every_system_call(
    torn: bool, server: Server, command: Command, out: Path, undisturbed: Undisturbed, run: Callable[..., Any]
) -> None:
    expected, events = undisturbed
    for event in events:
        kill_and_resume(server, command, out, event, expected, run, torn=torn)


def test_a_finished_run_survives_a_power_cut(
    server: Server, command: Command, out: Path, undisturbed: Undisturbed
) -> None:
    """All that it wrote is on the disk when it ends, with any part of the rest lost."""
    for seed in range(3):
        shutil.rmtree(out, ignore_errors=True)
        assert server.run(*command, output=out, at=-1, cut=seed).exit_code == 0
        assert hashes(out) == undisturbed[0], seed


@pytest.mark.parametrize("count", [6, pytest.param(300, marks=pytest.mark.slow)])
def test_the_power_is_cut(count: int, server: Server, command: Command, out: Path, undisturbed: Undisturbed) -> None:
    """What was never synced is lost at some calls, chosen by a seed: never a wrong folder, and the same bytes."""
    expected = undisturbed[0]
    calls = len(server.run(*command, output=out, cut=0).events)
    assert calls > len(undisturbed[1])
    draw = random.Random(count)
    for seed in range(count):
        shutil.rmtree(out, ignore_errors=True)
        at = draw.randrange(1 if seed % 2 else 2 * calls // 3, calls + 1)  # half of them while files are moved
        where = f"the power is cut at call {at} with seed {seed}"
        assert server.run(*command, output=out, at=at, cut=seed).exit_code == -signal.SIGKILL, where
        if out.exists():
            check_unfinished(out, expected)
        if hashes(out) != expected:
            resume(server, command, out, expected, where)


def test_zeros_in_place_of_written_tensors(
    server: Server, command: Command, out: Path, undisturbed: Undisturbed
) -> None:
    """The journal says that they are written, their pages are lost: they are written again."""
    expected, events = undisturbed
    chosen = tensor_writes(events)
    for damage in ("zeros", "cut short", "gone", "header"):
        shutil.rmtree(out, ignore_errors=True)
        server.run(*command, output=out, at=chosen[-2].number)
        for path in (out / PARTIAL).rglob("*.safetensors"):
            content = path.read_bytes()
            start = 8 + int.from_bytes(content[:8], "little")
            path.write_bytes(
                {
                    "zeros": content[:start] + bytes(len(content) - start),
                    "cut short": content[: len(content) // 2],
                    "gone": b"",
                    "header": bytes(start) + content[start:],
                }[damage]
            )
            if damage == "gone":
                path.unlink()
        resume(server, command, out, expected, damage)


def test_a_damaged_file_of_a_run_that_only_had_to_move_its_files(
    server: Server, command: Command, out: Path, undisturbed: Undisturbed
) -> None:
    """One line with the file and the next step; what the line says works."""
    expected, events = undisturbed
    publishing = stages(events)["publishing"]
    for event in (publishing[2], publishing[-4]):
        shutil.rmtree(out, ignore_errors=True)
        server.run(*command, output=out, at=event.number)
        path = next(out.rglob("model-00002*"))
        content = path.read_bytes()
        path.write_bytes(content[:-4096] + bytes(4096))
        refused = server.run(*command, "--resume", output=out)
        assert refused.exit_code == 1
        assert refused.stderr.startswith(f"Error: {path} SHA-256 mismatch, but it was complete before: add --overwrite")
        assert refused.stderr.count("\n") == 1
        again = server.run(*command, "--overwrite", output=out)
        assert again.exit_code == 0, again.stderr
        assert hashes(out) == expected


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "generation_config.json"])
def test_a_source_that_changes_during_the_run(name: str, pico: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    """It is one line with the file's name, and nothing is called finished."""
    model = Path(shutil.copytree(pico, tmp_path / "model"))

    def change(*_: Any) -> Any:
        (model / name).touch()
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loftq.verbs.quantize.distilled", change)  # after all tensors are written
        patch.setattr("loftq.verbs.quantize.write_configs", lambda *_: change())
        ended = run("quantize", model, "--output", tmp_path / "out", *SETTINGS)
    assert ended.exit_code == 1
    assert ended.stderr.startswith(f"Error: {model / name} was changed during the run: ")
    assert ended.stderr.count("\n") == 1
    assert not opens(tmp_path / "out")


def test_a_finished_folder_is_compared_before_it_is_used_again(
    pico: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    command = ("quantize", pico, "--output", tmp_path / "out", *SETTINGS)
    assert run(*command).exit_code == 0
    assert run(*command, "--resume").exit_code == 0
    path = tmp_path / "out" / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-4096] + bytes(4096))
    refused = run(*command, "--resume")
    assert refused.exit_code == 1
    assert f"is finished, but its {path.name} SHA-256 mismatch: add --overwrite" in refused.stderr


@pytest.mark.parametrize("torn", [False, True])
def test_killed_again_and_again(
    torn: bool, server: Server, command: Command, out: Path, undisturbed: Undisturbed
) -> None:
    """Every resumed run gets a little further than the one before, and the last one finishes."""
    expected, events = undisturbed
    # Each run reserves again, then solves some layers, or writes the small files: these are not in the journal.
    step = len(stages(events)["reserving"]) + len(stages(events)["finishing"]) + 12
    for _ in range(len(events)):
        ended = server.run(*command, "--resume", output=out, at=step, torn=torn)
        if ended.exit_code != -signal.SIGKILL:
            break
        check_unfinished(out, expected)
    assert ended.exit_code == 0, ended.stderr
    assert hashes(out) == expected


def test_a_line_of_the_journal_is_cut_off_twice(
    server: Server, command: Command, out: Path, undisturbed: Undisturbed
) -> None:
    """What follows half a line must not spoil the run, which is killed again with both in the journal."""
    expected, events = undisturbed
    note = [event.number for event in tensor_writes(events) if event.call == "write"][4]
    server.run(*command, output=out, at=note, torn=True)
    assert not (out / PARTIAL / "journal.jsonl").read_bytes().endswith(b"\n")
    again = server.run(*command, "--resume", output=out)
    assert hashes(out) == expected
    notes = [event.number for event in again.events if event.call == "write"]
    shutil.rmtree(out)
    server.run(*command, output=out, at=note, torn=True)
    server.run(*command, "--resume", output=out, at=notes[3], torn=True)
    resume(server, command, out, expected, "two torn lines")


def test_the_last_line_of_the_journal_is_cut_off(
    server: Server, command: Command, out: Path, undisturbed: Undisturbed
) -> None:
    """It says that all is made. Lost for good, the next run would take the files that have moved for unwritten."""
    expected, events = undisturbed
    ready = max(event.number for event in events if event.call == "write")
    server.run(*command, output=out, at=ready, torn=True)
    started = server.run(*command, "--resume", output=out)
    moves = [event.number for event in started.events if event.call == "replace"]
    assert hashes(out) == expected
    shutil.rmtree(out)
    server.run(*command, output=out, at=ready, torn=True)
    server.run(*command, "--resume", output=out, at=moves[5])
    resume(server, command, out, expected, "killed inside the last line, then while moving")


def test_what_was_done_is_not_done_again(server: Server, command: Command, out: Path, undisturbed: Undisturbed) -> None:
    expected, events = undisturbed
    solving = tensor_writes(events)
    server.run(*command, output=out, at=solving[-1].number)
    resumed = server.run(*command, "--resume", output=out)
    assert hashes(out) == expected
    written = [event for event in resumed.events if event.call == "write"]
    assert len(written) == 2, "one note for the last tensor, one line that all is there"


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_same_bytes_on_any_number_of_workers(
    workers: int, command: Command, out: Path, undisturbed: Undisturbed, run: Callable[..., Any]
) -> None:
    """The runs to compare with had one worker, in another process with other thread counts."""
    ended = run(*command, "--workers", workers)
    assert ended.exit_code == 0, ended.stderr
    assert hashes(out) == undisturbed[0]


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with matrices so large that a product is shared among threads, and differs with their number."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 320, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("larger") / "larger"
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).bfloat16().save_pretrained(folder)
    return folder


def test_same_bytes_on_any_number_of_threads(larger: Path, out: Path, run: Callable[..., Any]) -> None:
    import torch

    before = torch.get_num_threads()
    found = []
    try:
        for threads, workers in ((1, 1), (2, 1), (2, 2), (3, 3)):
            torch.set_num_threads(threads)
            assert run("quantize", larger, "--output", out, "--workers", workers, "--quiet").exit_code == 0
            found.append(hashes(out))
            shutil.rmtree(out)
    finally:
        torch.set_num_threads(before)
    assert found == [found[0]] * len(found)


def test_killed_with_several_workers(
    server: Server, command: Command, out: Path, undisturbed: Undisturbed, run: Callable[..., Any]
) -> None:
    expected, events = undisturbed
    for event in tensor_writes(events)[5::30]:
        kill_and_resume(server, (*command, "--workers", 3), out, event, expected, run)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--rank", 8], "rank was 4"),
        (["--iter", 3], "iters was 2"),
        (["--seed", 1], "seed was 0"),
        (["--double-quant"], "double_quant was False"),
        (["--max-shard-size", "1MB"], "max_shard_size was 60KB"),
        (["--exclude-modules", "down_proj"], "exclude_modules has changed"),
    ],
)
def test_resume_with_other_settings_is_refused(
    changed: list[object],
    named: str,
    server: Server,
    command: Command,
    out: Path,
    undisturbed: Undisturbed,
    run: Callable[..., Any],
) -> None:
    expected, events = undisturbed
    server.run(*command, output=out, at=tensor_writes(events)[20].number)
    before = hashes(out)
    refused = run(*command, *changed, "--resume")
    assert refused.exit_code == 1
    assert named in refused.stderr
    assert "--overwrite" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert hashes(out) == before
    resume(server, command, out, expected, "after a refusal")


def test_resume_with_a_changed_source_is_refused(
    pico: Path, tmp_path: Path, server: Server, command: Command, out: Path, undisturbed: Undisturbed
) -> None:
    model = Path(shutil.copytree(pico, tmp_path / "model"))
    weights = model / "model.safetensors"
    moved = (command[0], model, *command[2:])
    server.run(*moved, output=out, at=tensor_writes(undisturbed[1])[20].number)
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    refused = server.run(*moved, "--resume", output=out)
    assert refused.exit_code == 1
    assert "model.safetensors has changed" in refused.stderr
    assert refused.stderr.count("\n") == 1
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert server.run(*moved, "--resume", output=out).exit_code == 0
    assert opens(out)


def test_resume_with_another_model_is_refused(
    pico_sharded: Path,
    server: Server,
    command: Command,
    out: Path,
    undisturbed: Undisturbed,
    run: Callable[..., Any],
) -> None:
    server.run(*command, output=out, at=tensor_writes(undisturbed[1])[20].number)
    refused = run(command[0], pico_sharded, *command[2:], "--resume")
    assert refused.exit_code == 1
    assert f"name was {command[1]}" in refused.stderr


@pytest.fixture(scope="module")
def older(
    server: Server, command: Command, out: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Files, Files]:
    """A copy of an older artifact with files of the user's own in it; all its files; those of the user."""
    settings = ("--rank", 2, "--iter", 0, "--max-shard-size", "1GB")
    assert server.run(*command, *settings, output=out).exit_code == 0
    kept = Path(shutil.move(out, tmp_path_factory.mktemp("older") / "kept"))
    own = {"notes.txt": "mine", "loftq_init/notes.txt": "mine too", "checkpoint-7/adapter_config.json": "{}"}
    for name, text in own.items():
        (kept / name).parent.mkdir(exist_ok=True)
        (kept / name).write_text(text)
    files = hashes(kept)
    return kept, files, {name: files[name] for name in own}


@pytest.mark.parametrize("every", [16, pytest.param(1, marks=pytest.mark.slow)])
def test_overwriting_killed_before_a_system_call(
    every: int, server: Server, command: Command, out: Path, undisturbed: Undisturbed, older: tuple[Path, Files, Files]
) -> None:
    """The old artifact is whole until the new one is; it is never half of each; other files stay."""
    kept, old, own = older
    new = {**own, **undisturbed[0]}
    shutil.copytree(kept, out)
    overwritten = server.run(*command, "--overwrite", output=out)
    assert overwritten.exit_code == 0, overwritten.stderr
    assert hashes(out) == new
    stage = stages(overwritten.events)
    assert len(stage["publishing"]) >= 20
    for event in [stage["reserving"][-1], stage["finishing"][-1], *stage["publishing"][::every]]:
        shutil.rmtree(out)
        shutil.copytree(kept, out)
        killed = server.run(*command, "--overwrite", output=out, at=event.number)
        assert killed.exit_code == -signal.SIGKILL
        left = hashes(out)
        check_unfinished(out, new, old)
        assert own.items() <= left.items()
        if event not in stage["publishing"]:
            assert old.items() <= left.items(), event
        if left != new:
            resume(server, command, out, new, f"killed before {event}")


def test_giving_up_a_killed_run_with_overwrite(
    server: Server, command: Command, out: Path, undisturbed: Undisturbed
) -> None:
    """Other settings have other files: none of those that were half published may stay."""
    _, events = undisturbed
    other = (*command, "--rank", 2, "--max-shard-size", "1GB")
    assert server.run(*other, output=out).exit_code == 0
    expected = hashes(out)
    stage = stages(events)
    for event in [stage["solving"][9], stage["finishing"][-1], *stage["publishing"][1::12]]:
        shutil.rmtree(out)
        server.run(*command, output=out, at=event.number)
        started_again = server.run(*other, "--overwrite", output=out)
        assert started_again.exit_code == 0, f"{event}: {started_again.stderr}"
        assert hashes(out) == expected, event


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', '{"files": ["../precious"]}', "{}"])
def test_a_damaged_manifest_is_found_before_the_work(
    text: str, command: Command, out: Path, run: Callable[..., Any]
) -> None:
    """What loftq.json lists would be removed, so what it cannot be trusted in is refused, and nothing removed."""
    out.mkdir()
    precious = out.parent / "precious"
    precious.write_text("kept")
    (out / "loftq.json").write_text(text)
    refused = run(*command, "--overwrite")
    assert refused.exit_code == 1
    assert str(out / "loftq.json") in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert list(hashes(out)) == ["loftq.json"]
    assert precious.exists()


def test_two_runs_on_one_output(
    server: Server, command: Command, out: Path, undisturbed: Undisturbed, run: Callable[..., Any]
) -> None:
    expected, events = undisturbed
    first = server.run(*command, output=out, at=tensor_writes(events)[30].number, send=signal.SIGSTOP)
    assert first.stopped is not None
    try:
        before = hashes(out)
        refused = {flag: run(*command, *([flag] if flag else [])) for flag in ("", "--resume", "--overwrite")}
        assert hashes(out) == before
    finally:
        first = server.ask({"continue": first.stopped})
    for flag, second in refused.items():
        assert second.exit_code == 1
        assert second.stderr.count("\n") == 1
        assert (f"another run is writing {out}" if flag else "unfinished run") in second.stderr
    assert first.exit_code == 0, first.stderr
    assert hashes(out) == expected


@pytest.mark.parametrize("stage", ["reserving", "solving", "finishing", "publishing"])
def test_interrupted(stage: str, server: Server, command: Command, out: Path, undisturbed: Undisturbed) -> None:
    """Ctrl-C: one line, exit code 130, and --resume goes on."""
    expected, events = undisturbed
    chosen = stages(events)[stage]
    ended = server.run(*command, output=out, at=chosen[len(chosen) // 2].number, send=signal.SIGINT)
    assert ended.exit_code == 130
    assert ended.stderr.strip() == "interrupted: finished work is kept, add --resume to continue"
    check_unfinished(out, expected)
    resume(server, command, out, expected, f"interrupted while {stage}")


def is_locked(out: Path) -> bool:
    """Whether a process is at work on the output: the kernel lists the lock by the journal's inode."""
    journal = out / PARTIAL / "journal.jsonl"
    return journal.exists() and f":{journal.stat().st_ino} " in Path("/proc/locks").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_the_real_command_stopped_at_any_time(sent: signal.Signals, larger: Path, out: Path) -> None:
    loftq = str(Path(sys.executable).with_name("loftq"))
    settings = ("--rank", "8", "--iter", "9", "--svd", "exact", "--max-shard-size", "500KB", "--workers", "2")
    command = [loftq, "quantize", str(larger), "--output", str(out), *settings, "--quiet", "--json"]
    seconds = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["seconds"]
    expected = hashes(out)
    shutil.rmtree(out)
    seed = random.SystemRandom().randrange(2**32)
    delays = random.Random(seed)
    for _ in range(8):
        process = subprocess.Popen([*command, "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not is_locked(out):
            time.sleep(0.001)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delays.uniform(0, seconds / 4))
        process.send_signal(sent)
        message = process.communicate()[1]
        if process.returncode == 0 or hashes(out) == expected:  # done, or stopped while the interpreter leaves
            break
        assert process.returncode == (130 if sent == signal.SIGINT else -signal.SIGKILL), (seed, message)
        assert sent != signal.SIGINT or message.strip().startswith("interrupted"), (seed, message)
        check_unfinished(out, expected)
    if hashes(out) != expected:
        subprocess.run([*command, "--resume"], check=True, capture_output=True)
    assert hashes(out) == expected, seed


def serve(pico: str) -> None:
    """Warm up with one run, then run each command that comes on stdin in a fork of this process."""
    import torch
    from tqdm import tqdm

    from loftq.artifacts import staging
    from loftq_cli.main import main

    torch.set_num_threads(1)
    os.fsync = os.fdatasync = lambda _descriptor: None  # nothing here waits for a disk
    staging.EVERY = 0  # a line of the journal after each tensor, so that the tests can stop between any two
    tqdm.monitor_interval = 0  # or every bar starts a thread
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        main(["quantize", pico, "--output", f"{scratch}/out", *map(str, SETTINGS), "--workers", "1"])
    threads = list(Path("/proc/self/task").iterdir())
    assert len(threads) == 1, "a fork has only the thread that forked: what waits for another hangs"
    for line in sys.stdin:
        job = json.loads(line)
        child = job.get("continue")
        if child is None:
            child = os.fork()
            if child == 0:
                run_child(main, job)
        else:
            os.kill(child, signal.SIGCONT)
        status = os.waitpid(child, os.WUNTRACED)[1]
        stopped = child if os.WIFSTOPPED(status) else None
        code = 0 if stopped else os.waitstatus_to_exitcode(status)
        print(json.dumps({"exit_code": code, "stopped": stopped}), flush=True)


def run_child(main: Callable[[list[str]], Any], job: dict[str, Any]) -> None:
    """In the fork: count the calls, run, and leave without cleaning up after the server."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(120)  # rather killed than left behind
    for descriptor, path in ((1, os.devnull), (2, job["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    code = 70
    try:
        with Path(job["trace"]).open("w", buffering=1) as trace:
            disk = count_calls(job, trace.write)
            main(job["arguments"])
            if disk is not None and job["at"] == -1:
                disk.cut(job["cut"])
            code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.stderr.flush()
        os._exit(code)


def count_calls(job: dict[str, Any], trace: Callable[[str], object]) -> ForgetfulDisk | None:
    """Replace what changes files by functions that count, and signal this process at call number `at`.

    Returns the disk whose power is cut there instead, if there is to be one.
    """
    output = Path(job["output"])
    lock = threading.Lock()
    count = 0
    disk = None if job.get("cut") is None else ForgetfulDisk(output.parent)
    is_cut = False
    cutting: list[threading.Thread] = []

    def step(call: str, path: Path, half: Callable[[], object] | None = None) -> None:
        nonlocal count, is_cut
        while is_cut and threading.current_thread() is not cutting[0]:
            time.sleep(60)
        if is_cut or not path.is_relative_to(output):
            return
        with lock:
            count += 1
            if disk is not None:
                disk.changed()
            trace(json.dumps([count, call, path.relative_to(output).as_posix()]) + "\n")
            if count == job["at"]:
                if job["torn"] and half is not None:
                    half()
                if disk is not None:
                    cutting.append(threading.current_thread())
                    is_cut = True
                    disk.cut(job["cut"])
                os.kill(os.getpid(), job["send"])

    def opened(descriptor: int) -> Path:
        return Path(f"/proc/self/fd/{descriptor}").readlink()

    def named(path: Any, dir_fd: int | None) -> Path:
        return Path(path) if dir_fd is None else opened(dir_fd) / path

    def counted(original: Callable[..., Any], call: str, counter: Callable[..., None]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapped(*arguments: Any, **options: Any) -> Any:
            counter(call, *arguments, **options)
            return original(*arguments, **options)

        return wrapped

    def by_path(call: str, path: Any, *_: Any, dir_fd: int | None = None, **__: Any) -> None:
        step(call, named(path, dir_fd))

    def by_open(call: str, path: Any, flags: int, *_: Any, dir_fd: int | None = None) -> None:
        if flags & os.O_CREAT:
            step(call, named(path, dir_fd))

    def by_target(call: str, _source: Any, target: Any, **__: Any) -> None:
        step(call, Path(target))

    def by_descriptor(call: str, descriptor: int, *_: Any) -> None:
        step(call, opened(descriptor))

    def by_data(call: str, descriptor: int, data: Any, *offset: int) -> None:
        original = pwrite if offset else write
        step(call, opened(descriptor), lambda: original(descriptor, memoryview(data)[: len(data) // 2], *offset))

    def by_text(call: str, path: Path, text: str, **options: Any) -> None:
        step(call, path, lambda: write_text(path, text[: len(text) // 2], **options))

    def by_copy(call: str, source: Any, target: Any) -> None:
        data = Path(source).read_bytes()
        step(call, Path(target), lambda: Path(target).write_bytes(data[: len(data) // 2]))

    pwrite, write, write_text = os.pwrite, os.write, Path.write_text
    counters: dict[Callable[..., None], list[tuple[Any, str]]] = {
        by_path: [(os, "mkdir"), (os, "unlink"), (os, "rmdir")],
        by_open: [(os, "open")],
        by_target: [(os, "replace"), (os, "rename")],
        by_descriptor: [(os, "posix_fallocate"), (os, "ftruncate")],
        by_data: [(os, "pwrite"), (os, "write")],
        by_text: [(Path, "write_text")],
        by_copy: [(shutil, "copyfile")],
    }
    if disk is not None:
        os.fsync = os.fdatasync = disk.fsync
        counters[by_descriptor] += [(os, "fsync"), (os, "fdatasync")]
    for counter, calls in counters.items():
        for owner, call in calls:
            setattr(owner, call, counted(getattr(owner, call), call, counter))
    return disk
