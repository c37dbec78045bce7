"""Raw results: one line of JSON for each run that ended, appended and never rewritten."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from gwt_dist.study.plan import FINISHED

FILE = "results.jsonl"


def read_results(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The newest line of each run by its key, and the number of lines that cannot be read.

    A line that was cut when the machine went down is such a line: its run has not ended.

    Raises:
        ValueError: `path` is there and is no text file.
    """
    if not path.exists():
        return {}, 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ValueError(f"cannot read the results {path}: {error}") from None
    results: dict[str, dict[str, Any]] = {}
    bad = 0
    for line in lines:
        try:
            found = json.loads(line)
            results[found["key"]] = found
        except (json.JSONDecodeError, TypeError, KeyError):
            bad += bool(line.strip())
    return results, bad


def finished(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those that need not be run again; what could not be imported may be there the next time."""
    return {key: line for key, line in results.items() if line["status"] in FINISHED}


class Writer:
    """Appends lines to a file that one process writes at a time.

    Raises:
        ValueError: another process writes it, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}; give --output another folder") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"another study writes {path}; wait for it, or give --output another folder") from None
        self._file.seek(0, os.SEEK_END)
        if self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":  # cut off: what follows must not be glued to it
                self._file.write(b"\n")

    def write(self, line: dict[str, Any]) -> None:
        """One line, on disk when this returns."""
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
