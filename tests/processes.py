"""Python code in a process of its own that does not wait for imports.

An interpreter takes many seconds to import torch, transformers and peft. Here a server imports them once, and each
request runs in a fork of it: a process of its own, with its own arguments, environment, output and exit code, in which
neither loftq nor numba was ever imported. There are two servers:

- "torch" has imported torch with its compiler, but not huggingface_hub, which reads the environment when it is
  imported, nor transformers, whose import may come before or after that of loftq;
- "stock", a fork of the first, has imported transformers, peft and bitsandbytes too.

Their forks use one thread each. Where a fork cannot do what a new interpreter does (a GPU is present, or the system is
not Linux), there is no server, and every request starts an interpreter.

A test whose subject is what an import loads starts an interpreter itself.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

IMPORTS = {
    "torch": ("torch", "torch._inductor.compile_fx", "torch.distributed.tensor", "scipy.stats"),
    "stock": (
        "transformers.modeling_utils",
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
        "peft",
        "bitsandbytes",
    ),
}
ABSENT = {"torch": {"loftq", "numba", "transformers", "peft", "huggingface_hub"}, "stock": {"loftq", "numba"}}
BEFORE = {"stock": "torch"}  # the server of which another is a fork
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a fork has only the thread that forked
SECONDS = 300  # after which a process is killed, rather than left behind


class Process:
    """A process that a server has started, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, server: Path, job: Mapping[str, Any], pipes: bool) -> None:
        self.args = job["arguments"]
        self.folder = Path(tempfile.mkdtemp(prefix="process-"))
        streams = {name: self.folder / name for name in ("stdin", "stdout", "stderr")}
        for name, path in streams.items():
            os.mkfifo(path) if pipes and name != "stderr" else path.touch()
        self.connection, self.answers = connect(server, {**job, "streams": [str(path) for path in streams.values()]})
        self.pid = int(self.answers.readline())
        self.returncode: int | None = None
        self.stdin, self.stdout = (streams["stdin"].open("w"), streams["stdout"].open()) if pipes else (None, None)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.connection.settimeout(timeout)
            self.returncode = int(self.answers.readline())
            for file in (self.stdin, self.stdout, self.answers, self.connection):
                if file is not None:
                    file.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has printed, after it has ended."""
        self.wait(timeout)
        stdout, stderr = ((self.folder / name).read_text() for name in ("stdout", "stderr"))
        shutil.rmtree(self.folder)
        return stdout, stderr

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def connect(server: Path, job: Mapping[str, Any]) -> tuple[socket.socket, BinaryIO]:
    """Send a job. Two lines answer it: the number of the process, and its exit code when it has ended."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(server))
    connection.sendall(json.dumps(job).encode() + b"\n")
    return connection, connection.makefile("rb")


@functools.cache
def forks() -> bool:
    """Whether a fork of a process that has imported torch can do what a new interpreter does."""
    import torch

    return sys.platform == "linux" and not torch.cuda.is_available()


@functools.cache
def server_of(level: str) -> Path:
    """The address of a server, which ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="server-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    address = folder / "socket"
    if level in BEFORE:
        connection, _ = connect(server_of(BEFORE[level]), {"serve": [str(address), level]})
        atexit.register(connection.close)
    else:
        # In forks kernels are compiled, so that Triton's own are not to be interpreted.
        surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | THREADS
        process = subprocess.Popen(
            [sys.executable, __file__, address, level], stdin=subprocess.DEVNULL, env=surroundings
        )
        atexit.register(process.wait)
        atexit.register(process.kill)
    while not address.exists():
        time.sleep(0.01)
    return address


def start_python(
    code: str,
    *arguments: object,
    level: str = "stock",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pipes: bool = False,
    seconds: int = SECONDS,
) -> Process | subprocess.Popen[str]:
    """Start `python -c code arguments…` in a process that has imported what `level` says.

    With `pipes`, `stdin` and `stdout` are for a conversation; otherwise the one is empty and `communicate` gives the
    other. After `seconds` (0: never) the process is killed.
    """
    words = [str(argument) for argument in arguments]
    surroundings = dict(os.environ if env is None else env)
    if not forks():
        command = [sys.executable, "-c", code, *words]
        streams: dict[str, Any] = {"stdin": subprocess.PIPE if pipes else subprocess.DEVNULL, "text": True}
        streams |= {"stdout": subprocess.PIPE, "stderr": None if pipes else subprocess.PIPE}
        return subprocess.Popen(command, env=surroundings, cwd=cwd, **streams)
    job = {"code": code, "arguments": words, "env": surroundings, "cwd": str(cwd or Path.cwd()), "path": sys.path}
    return Process(server_of(level), {**job, "seconds": seconds}, pipes)


def run_python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -c code arguments…`, as `subprocess.run` would, in a process of `start_python`."""
    process = start_python(code, *arguments, **options)
    stdout, stderr = process.communicate(timeout=SECONDS)
    return subprocess.CompletedProcess(process.args, process.wait(), stdout, stderr)


class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    """Takes each job in a fork, which starts the process and waits for it."""

    parent = os.getppid()

    def service_actions(self) -> None:
        super().service_actions()
        if os.getppid() != self.parent:  # whoever wanted processes has ended
            os._exit(0)


class Handler(socketserver.StreamRequestHandler):
    """One job: a process, or a server that is a fork of this one."""

    def handle(self) -> None:
        job = json.loads(self.rfile.readline())
        if "serve" in job:
            serve(*job["serve"])
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the process gets it when it is ready to
        child = os.fork()
        if child == 0:
            run(job)
        self.wfile.write(b"%d\n" % child)
        status = os.waitpid(child, 0)[1]
        self.wfile.write(b"%d\n" % os.waitstatus_to_exitcode(status))


def serve(address: str, level: str) -> NoReturn:
    """Import what the level says, then answer until the parent process has ended."""
    for name in IMPORTS[level]:
        importlib.import_module(name)
    assert not ABSENT[level].intersection(sys.modules)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Server.parent = os.getppid()
    partial = f"{address}-"
    with Server(partial, Handler) as server:
        Path(partial).rename(address)
        server.serve_forever(poll_interval=0.2)
    os._exit(0)


def run(job: Mapping[str, Any]) -> NoReturn:
    """In the fork: be `python -c code arguments…`, and leave without cleaning up after the server."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(job["seconds"])
    for descriptor, path in enumerate(job["streams"]):
        os.dup2(os.open(path, os.O_WRONLY if descriptor else os.O_RDONLY), descriptor)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    sys.argv, sys.path[:] = ["-c", *job["arguments"]], ["", *job["path"]]
    code = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(*sys.argv[1:])
