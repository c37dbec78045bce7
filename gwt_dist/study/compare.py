"""A whole study: start what is wanted, write down what ends, until nothing is wanted or the time is up."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gwt_dist.study.config import Study, shapes_of
from gwt_dist.study.inputs import device_of
from gwt_dist.study.optimizers import options_of, version_of
from gwt_dist.study.plan import STAGES, Run, line_of, shared_by_all, tokens_to_go, wanted
from gwt_dist.study.prepared import Prepared, prepare
from gwt_dist.study.results import FILE, Writer, finished, read_results
from gwt_dist.study.workers import Workers
from gwt_dist.train.config import read_mapping
from gwt_dist.train.corpus import load_corpus

Show = Callable[[int, int, str], None]  # tokens done, tokens in all, what happens


@dataclass(frozen=True, slots=True)
class Ended:
    """How a call of `compare` ended: runs that it made, and runs that are left because the time was up."""

    made: int
    left: int


def identity(study: Study, text_sha256: str | None = None) -> str:
    """What all runs of `study` share: text, model, device and the keys that act on all.

    The text is read if its SHA-256 is not given.
    """
    shapes = read_mapping(shapes_of(study))
    return shared_by_all(study, text_sha256 or load_corpus(study.corpus).sha256, shapes, device_of(study))


def compare(
    study: Study,
    output: Path,
    *,
    jobs: int = 1,
    seconds: float | None = None,
    only: str = "",
    again: bool = False,
    show: Show = lambda done, total, text: None,
) -> Ended:
    """Make the runs that `study` wants and `output` does not have yet.

    Args:
        study: The study.
        output: Folder of its results; made if it is not there.
        jobs: Worker processes; 0 makes the runs in this process, one after the other.
        seconds: The call returns within so many, if the text is prepared in less and a run of this process (`jobs=0`)
            does not take longer than those before it: only runs that are expected to end in time are started, and
            those that do not are stopped.
        only: The name of a row; "" for all.
        again: Make runs anew that have ended before.
        show: Called with tokens done, tokens in all and a text whenever something starts or ends.

    Raises:
        ValueError: no such row, wrong options of one, no GPU for a study that asks for one, or another process writes
            to `output`.
    """
    deadline = _Deadline(seconds)
    if device_of(study) == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"the study {study.name} has device: cuda and torch sees no GPU here, so each of its runs would fail; "
            f"write device: cpu, or auto, which is either"
        )
    names = [row.name for row in study.rows]
    if only and only not in names:
        raise ValueError(f"no row {only!r} in the study; rows: {', '.join(names)}")
    for row in study.rows:  # what is wrong with one, before another trains
        if only in ("", row.name):
            options_of(row.optimizer, row.options, f"row {row.name!r}")
    made, done = 0, 0
    # Within the writer, so that one process prepares the text.
    with Writer(output / FILE) as writer, _engine(study, prepared := prepare(study, output), jobs) as engine:
        shared = identity(study, prepared.corpus_sha256)
        # Runs whose packages were missing are tried once in each call.
        results = {} if again else finished(read_results(output / FILE)[0])
        constants = _constants()
        while True:
            under_way = {run.key for run in engine.running}
            waiting = [run for run in wanted(study, shared, results, only) if run.key not in under_way]
            while engine.free and (fits := next((run for run in waiting if deadline.allows(run)), None)):
                engine.start(fits)
                waiting.remove(fits)
            total = done + tokens_to_go(study, shared, results, only)
            show(done, total, "; ".join(_title(run) for run in engine.running))
            if not engine.running or deadline.over:
                return Ended(made, len(waiting) + len(engine.running))
            for run, result in engine.ended(timeout=1.0):
                deadline.ended(run, result)
                line = {**line_of(run), **result, **constants, "package": version_of(run.optimizer)}
                writer.write(line)
                results[run.key] = line
                made, done = made + 1, done + run.cost


class _Deadline:
    """Whether a run can be expected to end in time, by the runs of this call that ended."""

    def __init__(self, seconds: float | None) -> None:
        self._last = None if seconds is None else time.monotonic() + seconds
        self._rates: dict[str, float] = {}  # of each row, seconds for a token of its slowest run

    @property
    def over(self) -> bool:
        return self._last is not None and time.monotonic() >= self._last

    def allows(self, run: Run) -> bool:
        """Before any run has ended every one is allowed, as long as there is time."""
        if self._last is None:
            return True
        rate = self._rates.get(run.row, max(self._rates.values(), default=0.0))
        return time.monotonic() + rate * run.cost < self._last

    def ended(self, run: Run, result: dict[str, Any]) -> None:
        if result["status"] == "ok":
            self._rates[run.row] = max(self._rates.get(run.row, 0.0), result["seconds"] / run.cost)


def _title(run: Run) -> str:
    return f"{run.row} {run.tokens} lr {run.lr:g} seed {run.seed}, {STAGES[run.stage]}"


class _Here:
    """The interface of `Workers`, in this process."""

    free = True

    def __init__(self, study: Study, prepared: Prepared) -> None:
        from gwt_dist.study.inputs import Inputs

        self._inputs = Inputs(study, prepared)
        self.running: list[Run] = []

    def start(self, run: Run) -> None:
        self.running.append(run)
        self.free = False

    def ended(self, timeout: float) -> Iterator[tuple[Run, dict[str, Any]]]:
        from gwt_dist.study.run import execute

        run = self.running.pop()
        self.free = True
        yield run, execute(run, self._inputs)


@contextmanager
def _engine(study: Study, prepared: Prepared, jobs: int) -> Iterator[Workers | _Here]:
    if jobs == 0:
        yield _Here(study, prepared)
    else:
        with Workers(study, prepared, jobs) as workers:
            yield workers


def _constants() -> dict[str, Any]:
    """What is the same in every line of a call: versions, the commit and the time."""
    names = ("gwt_dist", "torch", "transformers", "numpy")
    versions = {name: _version(name) for name in names}
    return {
        "versions": versions | {"python": platform.python_version()},
        "machine": platform.machine(),
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except Exception:  # a source tree that is on the path and not installed
        return ""


def _commit() -> str:
    """The commit of the source tree, with a + where files differ from it; '' outside of a repository of its own."""
    tree = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(tree)]
    try:
        top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=True)
        if not tree.samefile(top.stdout.strip()):  # installed below somebody's own repository
            return ""
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = ["status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run([*git, *status], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
