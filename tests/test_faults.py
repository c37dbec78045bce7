"""Kills, full disks, damage and ranks that hang: what was saved before loads, and the run goes on to the bit.

`make faults` is the full form of what is marked `faults`. Other faults have tests of their own: every bit of a file and
forged indexes in `test_checkpoint_damage.py`, errors of one rank in `test_checkpoint_roads.py`, NaN on one rank in
`test_pretrain.py`, restarts of the recipe in `test_resume.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest

from checkpoint_cases import Trained, steps
from fault_cases import (
    DAMAGE,
    LIMIT,
    SAVE,
    STEP,
    WORLD,
    Nursery,
    Tally,
    a_nursery,
    complete,
    damage_case,
    killed_at_random,
    lines,
    outputs,
    phase,
    undisturbed,
    wrong_loads,
    wrong_steps,
)
from pretrain_cases import arguments, curve, finish, started, torchrun, wait_for

CALLS = [(os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (os, "rmdir"), (os, "unlink")]


@pytest.fixture(scope="module")
def ones() -> Iterator[Nursery]:
    with a_nursery() as one:
        yield one


def check_kills(tally: Tally, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{json.dumps(vars(tally) | {'unloadable': len(tally.unloadable), 'wrong': len(tally.wrong)})}")
    assert tally.unloadable == []
    assert tally.wrong == []
    assert tally.slowest_to_leave < 20
    assert sum(tally.during.values()) == tally.kills


def test_killed_at_random(ones: Nursery, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_kills(killed_at_random(ones, tmp_path / "kills", "fsdp2", 6, seed=int(time.time())), capsys)


@pytest.mark.faults
@pytest.mark.usefixtures("torch_extensions_dir")
@pytest.mark.parametrize(("kind", "kills"), [("ddp", 40), ("fsdp2", 40), ("zero2", 10), ("zero3", 10)])
def test_killed_at_random_a_hundred_times(
    tmp_path: Path, kind: str, kills: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A start of DeepSpeed takes seconds, hence fewer of these."""
    with a_nursery(*(["deepspeed"] if kind.startswith("zero") else [])) as ones:
        tally = killed_at_random(ones, tmp_path / "kills", kind, kills, seed=int(os.environ.get("SEED", time.time())))
    check_kills(tally, capsys)
    assert tally.during["step"] and tally.during["save"]


class Killed(BaseException):
    """Nothing in a save may catch it, as nothing catches a SIGKILL."""


def test_a_save_that_dies_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each flush, each new name and each removal in turn: there is a checkpoint, and the next save works."""
    trained = Trained("one")
    trained.train(steps()[:1])
    trained.save(str(tmp_path / "whole"), 1)
    trained.save(str(tmp_path / "whole"), 2)
    calls, last, dying = 0, 0, True
    real = {(module, name): getattr(module, name) for module, name in CALLS}

    def patched(module: Any, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == last:
                raise Killed
            return real[module, name](*arguments, **keywords)

        return call

    while dying:
        last += 1
        place = tmp_path / str(last)
        shutil.copytree(tmp_path / "whole", place)
        with monkeypatch.context() as patch:
            for module, name in CALLS:
                patch.setattr(module, name, patched(module, name))
            calls, dying = 0, False
            try:
                trained.save(str(place), 3, keep=1)
            except Killed:
                dying = True
        loaded = trained.load(str(place)).step
        assert loaded in (2, 3), last
        trained.save(str(place), loaded + 1, keep=1)
        assert sorted(p.name for p in place.iterdir() if p.name.startswith(".")) == [], last
        assert trained.load(str(place)).step == loaded + 1
    assert last > 10


@pytest.mark.parametrize("doing", [STEP, SAVE], ids=["step", "save"])
def test_a_rank_that_hangs_lets_the_others_go(ones: Nursery, tmp_path: Path, doing: bytes) -> None:
    """Stopped, not killed, so that its connections stay open: the others leave by the process group's time limit."""
    run, timeout = tmp_path / "run", 3.0
    run.mkdir()
    place = str(run / "checkpoints")
    pids = ones.start(run, 0, "fsdp2", place, 10**9, timeout)
    limit = time.monotonic() + LIMIT
    while len(lines(run, "saved")[1]) < 3 or phase(run, 1) != doing:
        assert time.monotonic() < limit and not ones.ended().keys() & set(pids), outputs(run)
    os.kill(pids[1], signal.SIGSTOP)
    try:
        seconds = ones.wait(pids[:1], LIMIT)
    finally:
        os.kill(pids[1], signal.SIGKILL)
    assert seconds < timeout + 5
    assert ones.ended()[pids[0]] != 0
    ones.wait(pids)
    furthest = max(step for rank in lines(run, "digest") for _, (step, _) in rank) + 2
    ones.wait(ones.start(run, 1, "fsdp2", place, furthest, timeout))
    assert all(lines(run, "done")), outputs(run)
    assert lines(run, "unloadable") == [[], []]
    assert wrong_loads(run) + wrong_steps(run, undisturbed(ones, tmp_path / "undisturbed", "fsdp2", furthest)) == []


def small_disk(folder: Path, kilobytes: int) -> tuple[str, ...]:
    """Starts a command with a file system of this size at `folder`, which nobody else sees."""
    mount = f'mount -t tmpfs -o size={kilobytes}k none "$1" && shift && exec "$@"'
    return ("unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh", str(folder))


def test_a_full_disk_leaves_the_checkpoints_before(ones: Nursery, tmp_path: Path) -> None:
    """Two checkpoints fit, and a third is written before the oldest is removed."""
    run, disk = tmp_path / "run", tmp_path / "disk"
    run.mkdir()
    disk.mkdir()
    if (
        shutil.which("unshare") is None
        or subprocess.run([*small_disk(disk, 64), "true"], stderr=subprocess.DEVNULL).returncode
    ):
        pytest.skip("no small file system can be mounted here: unshare --map-root-user --mount is not allowed")
    ones.wait(ones.start(run, 0, "fsdp2", str(tmp_path / "roomy"), 2, LIMIT))
    size = sum(p.stat().st_size for p in (tmp_path / "roomy" / "step-00000002").iterdir())
    (run / "log-0").unlink()
    (run / "log-1").unlink()
    with a_nursery(before=small_disk(disk, int(2.5 * size / 1024))) as starved:
        starved.wait(starved.start(run, 1, "fsdp2", str(disk / "checkpoints"), 6, LIMIT))
    for rank in range(WORLD):
        ((_, (step, message, left)),) = lines(run, "not saved")[rank]
        assert step == 3 and "No space left on device" in message
        assert rank or left == ["latest", "step-00000001", "step-00000002"]  # rank 0 clears what was half written
        assert [what for _, what in lines(run, "loaded")[rank]] == [2]
        assert [what for _, what in lines(run, "done")[rank]] == [6]
    assert wrong_steps(run, undisturbed(ones, tmp_path / "undisturbed", "fsdp2", 6)) == []


NAMED = {
    "a bit in a rank's file": r"rank-00001.safetensors is damaged: bytes",
    "a bit in the index": "index.json is damaged",
    "a bit in latest": "latest is damaged",
    "two files swapped": "rank-0000",
    "a file cut short": "rank-00001.safetensors",
    "a file missing": "rank-00001.safetensors is missing",
    "a file of another run": "rank-00001.safetensors is damaged",
    "a file of another step": "rank-00001.safetensors",
    "an index of a newer version": "index.json has the format version 99 and this gwt_dist reads 1",
}


@pytest.mark.usefixtures("torch_extensions_dir")
@pytest.mark.parametrize("kind", ["fsdp2", "zero2"])
def test_damage_is_named_nothing_changes_and_the_checkpoint_before_goes_on(
    ranks: Callable[..., list[Any]], tmp_path: Path, kind: str
) -> None:
    assert NAMED.keys() == DAMAGE.keys()
    for found in ranks(2, damage_case, str(tmp_path), kind, timeout=120):
        for name, result in found.items():
            assert NAMED[name] in result["message"], name
            assert result["unchanged"], name
            assert result["error"] < 1e-6, name


@pytest.mark.faults
def test_the_recipe_is_killed_at_random(inputs: Path, torch_extensions_dir: Path, tmp_path: Path) -> None:
    """Under torchrun, which starts it again: ranks are killed while they start, load, train, validate and save."""
    random, kills = Random(int(os.environ.get("SEED", time.time()))), 6
    settings = {"steps": 150, "save_every": 1, "eval_every": 50, "warmup_steps": 2}
    whole, run = tmp_path / "whole", tmp_path / "run"
    with started([*torchrun(), *arguments(inputs, whole, **settings)]) as process:
        assert finish(process)[0] == 0
    done = 0
    with started([*torchrun(restarts=kills), *arguments(inputs, run, **settings), "--resume"]) as process:
        wait_for(run / "metrics.jsonl", process)
        while done < kills:
            time.sleep(random.uniform(2, 9))
            ranks = [p for p in psutil.Process(process.pid).children() if any("pretrain.py" in w for w in p.cmdline())]
            if process.poll() is not None or not ranks:
                break
            random.choice(ranks).kill()
            done += 1
        code, output = finish(process, 240)
    assert code == 0, output
    assert curve(run) == curve(whole)
    assert len(complete(run / "checkpoints")) == 2
    assert done >= 3


@pytest.mark.faults
def test_a_rank_of_the_recipe_that_hangs_lets_the_others_go(
    inputs: Path, torch_extensions_dir: Path, tmp_path: Path
) -> None:
    """Wherever the others wait for it, in groups that DeepSpeed made as well."""
    settings = {"steps": 10**6, "save_every": 0, "eval_every": 0, "timeout": 4}
    for i in range(3):
        run = tmp_path / str(i)
        with started([*torchrun(), *arguments(inputs, run, **settings)]) as process:
            wait_for(run / "metrics.jsonl", process)
            time.sleep(1)
            children = psutil.Process(process.pid).children()
            first, second = sorted((p for p in children if any("pretrain.py" in w for w in p.cmdline())), key=rank_of)
            second.suspend()
            try:
                first.wait(20)
            finally:
                second.kill()


def rank_of(process: psutil.Process) -> int:
    return int(process.environ()["RANK"])
