"""Processes that run runs, one torch thread each. A process that dies takes one run with it, not the study."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from gwt_dist.study.config import Study
from gwt_dist.study.plan import Run
from gwt_dist.study.prepared import Prepared

_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def _end_with(study: Any) -> None:
    """End this process when the study's is gone, also when it was killed: nobody would hear of the run."""
    study.join()
    os._exit(1)


def _serve(study: Study, prepared: Prepared, pipe: Connection) -> None:
    """The worker: map the inputs once, then run what comes through the pipe until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the study's to handle
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    from gwt_dist.study.inputs import Inputs
    from gwt_dist.study.run import execute

    inputs = Inputs(study, prepared)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            pipe.send(execute(pipe.recv(), inputs))


@dataclass(slots=True)
class _Worker:
    process: SpawnProcess
    pipe: Connection
    run: Run | None = None


class Workers:
    """`jobs` processes, started when there is work for them."""

    def __init__(self, study: Study, prepared: Prepared, jobs: int) -> None:
        self._study, self._prepared, self._jobs = study, prepared, jobs
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.pipe.close()
            if worker.run is not None:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join(10)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()

    @property
    def running(self) -> list[Run]:
        """Runs that are under way."""
        return [worker.run for worker in self._workers if worker.run is not None]

    @property
    def free(self) -> bool:
        """Whether one more run can be started now."""
        return len(self.running) < self._jobs

    def start(self, run: Run) -> None:
        """Start `run`; there must be a free worker."""
        assert self.free
        idle = [worker for worker in self._workers if worker.run is None]
        worker = idle[0] if idle else self._spawn()
        worker.run = run
        worker.pipe.send(run)

    def _spawn(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(self._study, self._prepared, theirs), daemon=True)
        before = {name: os.environ.get(name) for name in _ONE_THREAD}
        os.environ |= dict.fromkeys(_ONE_THREAD, "1")
        try:
            process.start()
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name)
                else:
                    os.environ[name] = value
        theirs.close()
        worker = _Worker(process, ours)
        self._workers.append(worker)
        return worker

    def ended(self, timeout: float) -> Iterator[tuple[Run, dict[str, Any]]]:
        """Runs that ended with their results, after at most `timeout` seconds of waiting; maybe none."""
        busy = {worker.pipe: worker for worker in self._workers if worker.run is not None}
        for pipe in wait(list(busy), timeout):
            worker = busy[pipe]  # type: ignore[index]
            run, worker.run = worker.run, None
            assert run is not None
            try:
                yield run, worker.pipe.recv()
            except (EOFError, ConnectionResetError):
                worker.process.join()
                code = worker.process.exitcode
                self._workers.remove(worker)
                yield run, {"status": "failed", "reason": f"the process of the run died with exit code {code}"}
