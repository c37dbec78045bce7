"""Ranks that train and save at every step, and are killed, stopped or starved of disk from outside.

A `Nursery` is one process that has imported torch and forks ranks off, so that a start costs a fraction of a second. A
rank takes real steps of `Trained` on gradients that depend on the place in the data and on torch's random state, and
leaves a line in `log-<rank>` for whatever it did; the parent compares the lines with those of a run that nobody
disturbed.
"""

from __future__ import annotations

import faulthandler
import hashlib
import importlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist

from checkpoint_cases import Trained, error_of, steps, uninterrupted
from gwt_dist import CheckpointError, dtensor
from gwt_dist.checkpoint import checkpoints
from gwt_dist.checkpoint.holdings import Run
from ranks import _environment
from zero_cases import Net, shapes_of

WORLD = 2
LIMIT = 60.0  # seconds for whatever should take a few
TIMEOUT = 10.0  # of the process group: for the others of a rank that dies before they have met
BEGIN, STEP, SAVE = b"b", b"t", b"s"  # what a rank is doing


# ---- a rank


class Decay:
    """A schedule: the learning rate shrinks a little with each step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0

    def step(self) -> None:
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01 * 0.999**self.steps

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def gradient(place: int) -> dict[str, torch.Tensor]:
    """Of the data at `place`, with noise from torch's own random state, the same on all ranks."""
    generator = torch.Generator().manual_seed(place)
    noise = 1 + torch.randint(0, 3, ()).item() / 4
    return {
        name: noise * torch.randint(-9, 10, shape, generator=generator).float() / 8
        for name, shape in shapes_of(Net()).items()
    }


def digest(trained: Trained) -> str:
    """SHA-256 of all that this rank goes on with: weights, masters, moments, norms, counts, rates, random state."""
    found, run = hashlib.sha256(), Run(trained.model, trained.optimizer)
    for local in [*run.weights.model, *run.weights.masters]:
        flat = local.buffer.detach().reshape(-1)
        for f in local.fragments:
            found.update(flat[f.offset : f.offset + f.numel].numpy().tobytes())
    for one in run.stepped:
        for value in run.optimizer.state.get(one.parameter, {}).values():
            found.update(dtensor.local(value).contiguous().numpy().tobytes())
    found.update(repr([group["lr"] for group in run.optimizer.param_groups]).encode())
    found.update(torch.get_rng_state().numpy().tobytes())
    return found.hexdigest()


class Diary:
    """What a rank tells its parent: lines that are there when it is killed, and what it is doing now."""

    def __init__(self, folder: Path, rank: int, attempt: int) -> None:
        self.attempt = attempt
        self._log = os.open(folder / f"log-{rank}", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        self._phase = os.open(folder / f"phase-{rank}", os.O_CREAT | os.O_WRONLY, 0o600)
        self.phase(BEGIN)

    def phase(self, what: bytes) -> None:
        os.pwrite(self._phase, what, 0)

    def write(self, kind: str, what: Any) -> None:
        os.write(self._log, (json.dumps([self.attempt, kind, what]) + "\n").encode())


def rank_of_a_run(rank: int, folder: str, attempt: int, kind: str, place: str, last: int, timeout: float) -> None:
    """Train to step `last`, saving at each step into `place`; to nowhere if that is empty."""
    diary = Diary(Path(folder), rank, attempt)
    faulthandler.register(signal.SIGUSR1)  # where is it, when it should have ended
    os.environ.update(_environment(rank, WORLD))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store-{attempt}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=timeout),
    )
    torch.manual_seed(0)
    parent = os.getppid()
    trained = Trained(kind)
    schedule = Decay(trained.optimizer)
    position = 0
    if place and Path(place, "latest").exists():
        position = _go_on(diary, trained, schedule, place)
    while position < last and os.getppid() == parent:  # a parent that was killed itself leaves nobody behind
        diary.phase(STEP)
        trained.train([gradient(position)])
        schedule.step()
        position += 1
        diary.write("digest", [position, digest(trained)])
        if place:
            diary.phase(SAVE)
            try:
                trained.save(place, position, extra={"position": position}, scheduler=schedule, keep=2)
                diary.write("saved", position)
            except CheckpointError as error:
                diary.write("not saved", [position, str(error), sorted(p.name for p in Path(place).iterdir())])
                trained.spoil()
                position, place = _go_on(diary, trained, schedule, place), ""
    diary.write("done", position)


def _go_on(diary: Diary, trained: Trained, schedule: Decay, place: str) -> int:
    """Load the latest checkpoint; its place in the data."""
    try:
        loaded = trained.load(place, scheduler=schedule)
    except CheckpointError as error:
        diary.write("unloadable", str(error))
        raise
    diary.write("loaded", loaded.step)
    return int(loaded.extra["position"])


# ---- the process that forks ranks


def nursery() -> None:
    """Forks ranks for each line of JSON on stdin, and tells which have ended; ends with its stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed has its say on stdout
    torch.set_num_threads(1)
    for module in sys.argv[1:]:
        importlib.import_module(module)
    Trained("one").train([gradient(0)])  # loads the kernels; nothing here starts a thread that a fork would lose
    children: set[int] = set()
    ended: dict[int, int] = {}
    while line := sys.stdin.readline():
        command = json.loads(line)
        if command:
            pids = [_fork(rank, *command) for rank in range(WORLD)]
            children.update(pids)
            print(json.dumps(pids), file=answers, flush=True)
        else:
            for pid in list(children):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    children.remove(pid)
                    ended[pid] = os.waitstatus_to_exitcode(status)
            print(json.dumps(ended), file=answers, flush=True)


def _fork(rank: int, folder: str, *rest: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        output = os.open(Path(folder, f"output-{rank}"), os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        rank_of_a_run(rank, folder, *rest)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
    return 0


class Nursery:
    """The parent's side. `before` is a command that starts it, such as one that mounts a small disk first; `modules`
    are imported before the first fork.
    """

    def __init__(self, *modules: str, before: tuple[str, ...] = ()) -> None:
        self._process = subprocess.Popen(
            [*before, sys.executable, "-c", "import fault_cases; fault_cases.nursery()", *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(0, WORLD),
            text=True,
            start_new_session=True,
        )

    def start(self, folder: Path, attempt: int, kind: str, place: str, last: int, timeout: float) -> list[int]:
        """The process ids of new ranks."""
        return list(self._ask([str(folder), attempt, kind, place, last, timeout]))

    def ended(self) -> dict[int, int]:
        """Exit codes of the ranks that are no more."""
        return {int(pid): code for pid, code in self._ask([]).items()}

    def wait(self, pids: list[int], seconds: float = LIMIT) -> float:
        """Seconds until all of these have ended; `AssertionError` if it takes longer."""
        start = time.monotonic()
        while not set(pids) <= self.ended().keys():
            if time.monotonic() - start > seconds:
                left = set(pids) - self.ended().keys()
                for pid in left:
                    os.kill(pid, signal.SIGUSR1)
                time.sleep(0.5)
                raise AssertionError(f"{left} still there after {seconds} s")
            time.sleep(0.005)
        return time.monotonic() - start

    def _ask(self, command: list[Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        assert select.select([self._process.stdout], [], [], 2 * LIMIT)[0], "no answer"
        line = self._process.stdout.readline()
        assert line, "the process that forks ranks has died"
        return json.loads(line)

    def close(self) -> None:
        """Kills all that was started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


@contextmanager
def a_nursery(*modules: str, before: tuple[str, ...] = ()) -> Iterator[Nursery]:
    one = Nursery(*modules, before=before)
    try:
        yield one
    finally:
        one.close()


# ---- what the parent does


def lines(folder: Path, kind: str) -> list[list[tuple[int, Any]]]:
    """By rank, attempt and content of the lines of a kind; a line that a kill cut off is none."""
    found: list[list[tuple[int, Any]]] = []
    for rank in range(WORLD):
        path = folder / f"log-{rank}"
        text = path.read_text() if path.exists() else ""
        rows = [json.loads(line) for line in text.split("\n")[:-1]]
        found.append([(attempt, what) for attempt, this, what in rows if this == kind])
    return found


def phase(folder: Path, rank: int) -> bytes:
    path = folder / f"phase-{rank}"
    return path.read_bytes() if path.exists() else b""


def undisturbed(ones: Nursery, folder: Path, kind: str, last: int) -> list[dict[int, str]]:
    """By rank, what it goes on with after each step of a run that nobody disturbs and that saves nothing."""
    folder.mkdir()
    ones.wait(ones.start(folder, 0, kind, "", last, LIMIT), 4 * LIMIT)
    found = [{step: sha for _, (step, sha) in rank} for rank in lines(folder, "digest")]
    assert all(rank.keys() == set(range(1, last + 1)) for rank in found), outputs(folder)
    return found


def outputs(folder: Path) -> str:
    return "\n".join(p.read_text()[-3000:] for p in sorted(folder.glob("output-*")))


@dataclass
class Tally:
    """What came of the kills."""

    kills: int = 0
    during: dict[str, int] = field(default_factory=lambda: {"begin": 0, "step": 0, "save": 0})
    steps: int = 0
    unloadable: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    slowest_to_leave: float = 0.0
    seconds: float = 0.0


def killed_at_random(ones: Nursery, folder: Path, kind: str, kills: int, seed: int) -> Tally:
    """Ranks of one run, of which a random one is killed at a random moment, again and again."""
    random, tally, started = Random(seed), Tally(), time.monotonic()
    run, place = folder / "run", folder / "run" / "checkpoints"
    run.mkdir(parents=True)
    names = {BEGIN: "begin", STEP: "step", SAVE: "save"}
    for attempt in range(kills):
        pids = ones.start(run, attempt, kind, str(place), 10**9, TIMEOUT)
        victim = random.randrange(WORLD)
        if random.random() > 0.1:  # else while it starts, or loads
            wanted = random.choice([STEP, SAVE])
            at_least = random.randrange(1, 5)
            limit = time.monotonic() + LIMIT
            while sum(a == attempt for a, _ in lines(run, "digest")[victim]) < at_least or phase(run, victim) != wanted:
                assert time.monotonic() < limit and not ones.ended().keys() & set(pids), outputs(run)
                time.sleep(random.uniform(0, 0.003))
            time.sleep(random.uniform(0, 0.02))
        else:
            time.sleep(random.uniform(0, 0.5))
        os.kill(pids[victim], signal.SIGKILL)
        at = phase(run, victim)
        tally.during[names.get(at, "begin")] += 1
        if at in (BEGIN, b""):  # those that wait to meet it are ended by the launcher
            for pid in set(pids) - ones.ended().keys():
                os.kill(pid, signal.SIGKILL)
        try:
            seconds = ones.wait(pids)
        except AssertionError as error:
            raise AssertionError(f"{error}, rank {victim} killed in {at!r}:\n{outputs(run)}") from None
        tally.slowest_to_leave = max(tally.slowest_to_leave, seconds)
    tally.kills = kills
    # Once more, to see that the last kill did no harm either: two steps further than anybody came.
    furthest = max([step for rank in lines(run, "digest") for _, (step, _) in rank], default=0) + 2
    ones.wait(ones.start(run, kills, kind, str(place), furthest, LIMIT))
    assert all(done for done in lines(run, "done")), outputs(run)
    tally.steps = furthest
    tally.unloadable = [message for rank in lines(run, "unloadable") for _, message in rank]
    tally.wrong = wrong_loads(run) + wrong_steps(run, undisturbed(ones, folder / "undisturbed", kind, furthest))
    tally.seconds = time.monotonic() - started
    shutil.rmtree(folder)
    return tally


def wrong_loads(run: Path) -> list[str]:
    """Starts that went on from another checkpoint than the newest."""
    wrong = []
    saved = [entry for rank in lines(run, "saved") for entry in rank]
    for rank, entries in enumerate(lines(run, "loaded")):
        for attempt, step in entries:
            newest = max((s for a, s in saved if a < attempt), default=0)
            begun = max((s for one in lines(run, "digest") for a, (s, _) in one if a < attempt), default=0)
            if not newest <= step <= begun:
                wrong.append(f"start {attempt}: rank {rank} loaded step {step}, of {newest} saved, {begun} begun")
    return wrong


def wrong_steps(run: Path, expected: list[dict[int, str]]) -> list[str]:
    """Steps that led elsewhere than those of a run that nobody disturbed, in any bit of what a rank goes on with."""
    wrong = []
    for rank, digests in enumerate(lines(run, "digest")):
        for attempt, (step, sha) in digests:
            if expected[rank][step] != sha:
                wrong.append(f"start {attempt}: rank {rank} is elsewhere after step {step}")
    return wrong


# ---- damage, found by ranks of a pool


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1 << 3
    path.write_bytes(content)


def _swap(folder: Path) -> None:
    one, other, between = (folder / name for name in ("rank-00000.safetensors", "rank-00001.safetensors", "between"))
    one.rename(between)
    other.rename(one)
    between.rename(other)


def _newer(path: Path) -> None:
    folder = path / "step-00000003"
    text = json.dumps(json.loads((folder / "index.json").read_text()) | {"version": 99}).encode()
    sha256 = hashlib.sha256(text).hexdigest()
    (folder / "index.json").write_bytes(text)
    (folder / "index.json.sha256").write_text(f"{sha256}  index.json\n")
    (path / "latest").write_text(f"{sha256}  step-00000003/index.json\n")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, Any] = {
    "a bit in a rank's file": lambda path, other: _flip(path / "step-00000003" / "rank-00001.safetensors"),
    "a bit in the index": lambda path, other: _flip(path / "step-00000003" / "index.json"),
    "a bit in latest": lambda path, other: _flip(path / "latest"),
    "two files swapped": lambda path, other: _swap(path / "step-00000003"),
    "a file cut short": lambda path, other: _truncate(path / "step-00000003" / "rank-00001.safetensors"),
    "a file missing": lambda path, other: (path / "step-00000003" / "rank-00001.safetensors").unlink(),
    "a file of another run": lambda path, other: shutil.copy(
        other / "step-00000003" / "rank-00001.safetensors", path / "step-00000003"
    ),
    "a file of another step": lambda path, other: shutil.copy(
        path / "step-00000002" / "rank-00001.safetensors", path / "step-00000003"
    ),
    "an index of a newer version": lambda path, other: _newer(path),
}


def damage_case(folder: str, kind: str) -> dict[str, dict[str, Any]]:
    """By damage to the newest checkpoint: what loading it says, whether it changed anything, and where the run gets
    from the checkpoint before.
    """
    whole, other, rank = Path(folder, "whole"), Path(folder, "other"), dist.get_rank()
    trained = Trained(kind)
    trained.train([{name: -g for name, g in step.items()} for step in steps()[:3]])
    trained.save(str(other), 3)
    trained.close()
    trained = Trained(kind)
    trained.train(steps()[:2])
    trained.save(str(whole), 2)
    trained.train(steps()[2:3])
    trained.save(str(whole), 3)
    found = {}
    for name, damage in DAMAGE.items():
        path = Path(folder, "damaged")
        dist.barrier()
        if rank == 0:
            shutil.copytree(whole, path)
            damage(path, other)
        dist.barrier()
        trained.train(steps()[3:4])  # somewhere else than any checkpoint
        before, message = digest(trained), "no error"
        try:
            trained.load(str(path))
        except CheckpointError as error:
            message = str(error)
        unchanged = digest(trained) == before
        trained.load(str(path), which=2)
        trained.train(steps()[2:])
        found[name] = {
            "message": message,
            "unchanged": unchanged,
            "error": error_of(trained.weights(), uninterrupted(torch.float32)),
        }
        dist.barrier()
        if rank == 0:
            shutil.rmtree(path)
    trained.close()
    return found


def complete(place: Path) -> list[str]:
    """Names of the checkpoints in a folder."""
    return [path.name for path in checkpoints(place)]
