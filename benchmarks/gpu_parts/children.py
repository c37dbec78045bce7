"""Parts and ranks in processes of their own: what hangs or crashes there ends with them, and their rows are kept.

They are forked off a process that has imported torch and has not touched a GPU, so none of them imports it again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from gpu_parts.setting import Row, summary

_FORK = multiprocessing.get_context("fork")


class Stopped(Exception):
    """A child that ended or was silent before it was done."""


class Child:
    """A process that runs a function which yields rows; with `leads` what it starts can be ended with it."""

    def __init__(self, function: Callable[..., Iterator[Row]], *args: Any, leads: bool = False) -> None:
        self._leads = leads
        self._ours, theirs = _FORK.Pipe(duplex=False)
        self._process = _FORK.Process(target=_run, args=(theirs, leads, function, args))
        self._process.start()
        theirs.close()

    def receive(self, deadline: float) -> Row | None:
        """The next row; None after the last. Raises `Stopped` if neither comes before `deadline`."""
        try:
            if not self._ours.poll(max(0.0, deadline - time.monotonic())):
                raise Stopped("stopped: no row within its time")
            row: Row | None = self._ours.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(5)
            raise Stopped(f"its process ended with exit code {self._process.exitcode}") from None
        return row

    def end(self, seconds: float = 2.0) -> None:
        """Wait so long for its end, then end it."""
        self._process.join(seconds)
        if self._leads:
            try:
                os.killpg(self._process.ident or 0, signal.SIGKILL)  # what it started may have outlived it
            except ProcessLookupError:
                pass
        elif self._process.is_alive():
            self._process.kill()
        self._process.join(10)
        self._ours.close()


def _run(rows: Connection, leads: bool, function: Callable[..., Iterator[Row]], args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if leads:
        os.setsid()
    try:
        for row in function(*args):
            rows.send(row)
    except BaseException as error:
        traceback.print_exc()
        rows.send({"case": "the rest", "error": summary(error)})
    rows.send(None)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of a communicator or a GPU's runtime may keep a plain exit waiting.
    os._exit(0)
