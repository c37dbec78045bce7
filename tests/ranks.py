"""Runs a function on N real processes that share a gloo process group.

A pool keeps its processes between cases, so that hundreds of small cases pay for one start::

    def total(value):                            # module-level: workers import it by name
        tensor = torch.tensor([value + dist.get_rank()])
        dist.all_reduce(tensor)
        return tensor.item()                     # plain data: it travels back by pickle

    def test_total(ranks):                       # the fixture of conftest.py
        assert ranks(3, total, 10) == [33, 33, 33]

How it works. The parent writes ``case-<n>`` (function and arguments) into a temporary folder and a
line ``<n>`` to every worker's stdin; worker r answers with the file ``result-<n>-<r>``. The verdict
is these files alone, not exit codes: gloo can abort a process that has done all its work. Processes
find each other through a file as well, and gloo is kept on the loopback interface, so no port is
chosen that could be taken. A case that raises, hangs or dies ends the whole pool with SIGKILL (its
ranks are out of step by then); the next case starts a fresh one. A worker whose parent dies sees
the end of its stdin and leaves. Workers are started, or forked by a process that has imported torch
already (`forks.py`), which is how the fixture has them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from forks import Forked, Forks

START_TIMEOUT = 120.0  # seconds until all workers have imported torch and met each other
GRACE = 1.0  # seconds for the other ranks to report too, once one has failed
LOG_TAIL = 6000  # characters of a worker's output that a failure shows

READY = 0  # the number of the "case" that a worker reports when it has started


class RanksFailed(AssertionError):
    """A case failed on at least one rank; the message has every rank's traceback or output."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, forks: Forks | None = None
) -> list[Any]:
    """`[function(*args) on rank 0, on rank 1, ...]`, on fresh processes that end with the call.

    For cases that change a process for good; the others use a pool.
    """
    pool = RankPool(world_size, forks)
    try:
        return pool.run(function, *args, timeout=timeout)
    finally:
        pool.close()


class RankPool:
    """`world_size` processes, started by the first `run` and again after a failed one; forked if `forks` are given."""

    def __init__(self, world_size: int, forks: Forks | None = None) -> None:
        if world_size < 1:
            raise ValueError(f"world_size={world_size}: at least 1 is needed")
        self.world_size = world_size
        self._forks = forks
        self._processes: list[subprocess.Popen[bytes] | Forked] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._case = READY

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """`function(*args)` on every rank at once; what each returned, in rank order.

        Raises `RanksFailed` when a rank raised, died, or did not answer within `timeout` seconds.
        """
        # A function that cannot travel (a lambda, a closure) fails here, before anything starts.
        case = pickle.dumps((function, args))
        try:
            if not self._processes:
                self._start()
            self._case += 1
            self._path(f"case-{self._case}").write_bytes(case)
            log_starts = [self._log(rank).stat().st_size for rank in range(self.world_size)]
            for process in self._processes:
                assert process.stdin is not None
                try:
                    process.stdin.write(b"%d\n" % self._case)
                    process.stdin.flush()
                except BrokenPipeError:
                    pass  # it died between two cases: _collect says how
            name = f"{function.__module__}.{getattr(function, '__qualname__', function)}"
            results = self._collect(self._case, name, timeout, log_starts)
            self._path(f"case-{self._case}").unlink()
            for rank in range(self.world_size):
                self._path(f"result-{self._case}-{rank}").unlink()
            return results
        except BaseException:  # a failed case, and also Ctrl-C or pytest's own timeout
            self.close()
            raise

    def close(self) -> None:
        """Kills and reaps all workers (idle ones have nothing to save); removes the folder."""
        for process in self._processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # with what it may have started itself
            except ProcessLookupError:
                pass
        for process in self._processes:
            process.wait()
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # what a worker that died between two cases has not read
                process.stdin.close()
        self._processes = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def pids(self) -> list[int]:
        """The workers' process ids, in rank order; empty while none runs."""
        return [process.pid for process in self._processes]

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return Path(self._folder.name, name)

    def _log(self, rank: int) -> Path:
        return self._path(f"rank{rank}.log")

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._case = READY
        for rank in range(self.world_size):
            environment = _environment(rank, self.world_size)
            with self._log(rank).open("wb") as log:
                if self._forks:
                    self._processes.append(self._forks.start(environment, self._folder.name, log))
                    continue
                process = subprocess.Popen(
                    [sys.executable, "-c", "import ranks; ranks.worker()", self._folder.name],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a process group of its own, see close()
                )
            self._processes.append(process)
        self._collect(READY, "the start of the workers", START_TIMEOUT, [0] * self.world_size)

    def _collect(self, case: int, name: str, timeout: float, log_starts: list[int]) -> list[Any]:
        """What the ranks report of a case, or `RanksFailed` with everything known about it."""
        start = time.monotonic()
        deadline = start + timeout
        values: dict[int, Any] = {}
        errors: dict[int, str] = {}
        while len(values) + len(errors) < self.world_size and time.monotonic() < deadline:
            for rank, process in enumerate(self._processes):
                if rank in values or rank in errors:
                    continue
                # Asked first: a worker that reported and then ended has not failed.
                exit_code = process.poll()
                path = self._path(f"result-{case}-{rank}")
                if path.exists():
                    ok, content = pickle.loads(path.read_bytes())
                    (values if ok else errors)[rank] = content
                elif exit_code is not None:
                    log = self._output(rank, log_starts)
                    errors[rank] = f"{_ending(exit_code)} before it reported\n{log}"
                if errors:
                    deadline = min(deadline, time.monotonic() + GRACE)
            time.sleep(0.005)
        if len(values) == self.world_size:
            return [values[rank] for rank in range(self.world_size)]

        silent = [r for r in range(self.world_size) if r not in values and r not in errors]
        seconds = time.monotonic() - start
        for rank in silent:  # let them say where they are
            self._processes[rank].send_signal(signal.SIGUSR1)
        if silent:
            time.sleep(0.3)
        for rank in silent:
            log = self._output(rank, log_starts)
            errors[rank] = f"did not answer within {seconds:.1f} s and was killed\n{log}"
        raise RanksFailed(
            f"{name} failed on rank {', '.join(map(str, sorted(errors)))} of {self.world_size}\n"
            + "\n".join(f"--- rank {rank}: {errors[rank]}" for rank in sorted(errors))
        )

    def _output(self, rank: int, log_starts: list[int]) -> str:
        text = self._log(rank).read_bytes()[log_starts[rank] :].decode(errors="replace").strip()
        return text[-LOG_TAIL:] or "(no output)"


def _ending(exit_code: int) -> str:
    if exit_code < 0:
        return f"was ended by {signal.Signals(-exit_code).name}"
    return f"exited with {exit_code}"


def _environment(rank: int, world_size: int) -> dict[str, str]:
    """What a launcher would set, for CPU ranks that talk over loopback only."""
    environment = dict(os.environ)
    # The deepspeed launcher's mark for "all ranks on this machine": with it DeepSpeed opens shared
    # memory under a fixed name and never removes it.
    environment.pop("LOCAL_SIZE", None)
    environment |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        # DeepSpeed wants them to be set. The process group exists by then, so nobody connects; and
        # a case that tries to gets an error instead of somebody else's port.
        "MASTER_ADDR": "nobody.invalid",
        "MASTER_PORT": "0",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
        # The test modules are imported in the workers by the names that pytest gave them.
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    interfaces = {name for _, name in socket.if_nameindex()}
    for loopback in ("lo", "lo0"):
        if loopback in interfaces:
            environment["GLOO_SOCKET_IFNAME"] = loopback
    return environment


def worker() -> None:
    """A worker process: joins the group, then runs cases until its stdin ends."""
    import torch
    import torch.distributed as dist

    folder = Path(sys.argv[1])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=False)  # the parent asks before it kills
    warnings.filterwarnings("error", module="gwt_dist")

    cases: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=_read_cases, args=(cases,), daemon=True).start()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(hours=1),  # the parent's limits are shorter and say more
    )
    _report(folder, READY, rank, (True, None))
    while True:
        case = cases.get()
        torch.manual_seed(0)  # a case does not depend on the cases before it
        try:
            function, args = pickle.loads((folder / f"case-{case}").read_bytes())
            answer = pickle.dumps((True, function(*args)))
        except BaseException:
            answer = pickle.dumps((False, f"raised\n{traceback.format_exc()}"))
        gc.collect()  # engines are full of cycles; the next case starts without them
        gc.freeze()  # DeepSpeed collects a dozen times an engine: over what a case made, not over all that is imported
        _report(folder, case, rank, answer)


def _read_cases(cases: queue.SimpleQueue[int]) -> None:
    for line in sys.stdin:
        cases.put(int(line))
    # The parent is gone. Output is unbuffered, so nothing is lost; a plain exit could hang in, or
    # be aborted by, gloo's own threads.
    os._exit(0)


def _report(folder: Path, case: int, rank: int, answer: bytes | tuple[bool, Any]) -> None:
    """Writes the result file whole or not at all: the parent may look at any moment."""
    path = folder / f"result-{case}-{rank}"
    temporary = folder / f"writing-{rank}"
    temporary.write_bytes(answer if isinstance(answer, bytes) else pickle.dumps(answer))
    temporary.replace(path)
