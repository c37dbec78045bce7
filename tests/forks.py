"""A process that has imported torch and what else ranks need, and forks ranks off, in no time.

It answers one request at a time, on a socket. A request to fork carries the two files that become stdin and output of
the new process, which runs `ranks.worker` as if it had been started: in an environment and a process group of its own.
The forking process has one thread and has opened nothing that two could share.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from typing import Any, BinaryIO

START_TIMEOUT = 120.0  # seconds for its imports
ASK_AGAIN = 0.05  # seconds before it is asked again whether a process has ended


class Forks:
    """The parent's side. `modules` are imported before the first fork."""

    def __init__(self, *modules: str) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(START_TIMEOUT)
        self._requests = 0
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "import forks; forks.serve()", str(theirs.fileno()), *modules],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # DeepSpeed has its say when it is imported
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "CUDA_VISIBLE_DEVICES": "",
                    "PYTHONUNBUFFERED": "1",
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                },
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the process that forks."""
        return self._process.pid

    def start(self, environment: dict[str, str], folder: str, log: BinaryIO) -> Forked:
        """A new process that runs `ranks.worker` in this environment."""
        stdin, ours = os.pipe()
        request = {"environment": environment, "path": [path for path in sys.path if path], "folder": folder}
        try:
            pid = self.ask(request, [stdin, log.fileno()])
        except BaseException:  # a time limit, or Ctrl-C: it is born perhaps, and nobody knows
            os.close(ours)
            self.ask({"undo": self._requests})
            raise
        finally:
            os.close(stdin)
        return Forked(self, pid, os.fdopen(ours, "wb"))

    def ask(self, request: dict[str, Any], files: list[int] | None = None) -> Any:
        """The answer to one request."""
        self._requests += 1
        socket.send_fds(self._channel, [json.dumps([self._requests, request]).encode()], files or [])
        while True:
            message = self._channel.recv(1 << 16)
            assert message, "the process that forks ranks has died"
            number, answer = json.loads(message)
            if number == self._requests:  # others are those of requests that a time limit or Ctrl-C cut off
                return answer

    def close(self) -> None:
        """Ends the forking process; what it has forked ends by `RankPool.close`."""
        self._channel.close()
        self._process.kill()
        self._process.wait()


class Forked:
    """What `RankPool` needs of a `subprocess.Popen`, for a process that another one has forked."""

    def __init__(self, forks: Forks, pid: int, stdin: BinaryIO) -> None:
        self.pid = pid
        self.stdin = stdin
        self._forks = forks
        self._code: int | None = None
        self._asked = 0.0

    def poll(self) -> int | None:
        """Its exit code once it has ended, a little later perhaps."""
        if self._code is None and time.monotonic() - self._asked > ASK_AGAIN:
            self._code = self._forks.ask({"ended": self.pid, "wait": False})
            self._asked = time.monotonic()
        return self._code

    def wait(self) -> int:
        """Its exit code, as soon as it has ended."""
        if self._code is None:
            self._code = self._forks.ask({"ended": self.pid, "wait": True})
        assert self._code is not None
        return self._code

    def send_signal(self, number: int) -> None:
        """A signal to it, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def serve() -> None:
    """Imports, then answers until the parent is gone."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    warnings.filterwarnings("error", module="gwt_dist")
    for module in ("ranks", *sys.argv[2:]):
        importlib.import_module(module)
    gc.freeze()  # or the first collection of every fork would copy all of it
    born: dict[int, int] = {}  # the process of the last request to fork
    while True:
        message, files, _, _ = socket.recv_fds(channel, 1 << 18, 2)
        if not message:
            os._exit(0)
        number, request = json.loads(message)
        if "undo" in request:
            pid, answer = born.get(request["undo"]), None
            if pid:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        elif "ended" in request:
            pid, status = os.waitpid(request["ended"], 0 if request["wait"] else os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                channel.close()
                _become(request, *files)
            os.setpgid(answer, answer)  # a process group of its own before anybody knows it, see RankPool.close()
            born = {number: answer}
        for file in files:
            os.close(file)
        channel.send(json.dumps([number, answer]).encode())


def _become(request: dict[str, Any], stdin: int, output: int) -> None:
    """A worker of `ranks.py`, for as long as this process lives."""
    try:
        os.setpgid(0, 0)
        for file, number in ((stdin, 0), (output, 1), (output, 2)):
            os.dup2(file, number)
        os.close(stdin)
        os.close(output)
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.path[:] = ["", *request["path"]]
        sys.argv[1:] = [request["folder"]]

        from ranks import worker

        worker()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
