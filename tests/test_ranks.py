"""The harness itself: a test bed that hides failures would make every other test worthless."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import psutil
import pytest
import torch
import torch.distributed as dist

from forks import Forks
from ranks import RankPool, RanksFailed, run_ranks


@pytest.fixture(scope="module")
def pool(forks: Forks) -> Iterator[RankPool]:
    pool = RankPool(3, forks)
    yield pool
    pool.close()


def total(value: int) -> torch.Tensor:
    tensor = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(tensor)
    return tensor


def who() -> tuple[int, int, str, int]:
    return dist.get_rank(), dist.get_world_size(), os.environ["LOCAL_RANK"], os.getpid()


def group() -> int:
    return os.getpgid(0)


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"the trouble of rank {rank}")
    dist.barrier()


def sleep_on(rank: int) -> None:
    print("about to sleep")
    while dist.get_rank() == rank:
        time.sleep(1)


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def return_unpicklable() -> Any:
    return lambda: None


def random_number() -> float:
    return torch.rand(()).item()


def test_results_come_in_rank_order_from_processes_that_stay(pool: RankPool) -> None:
    first = pool.run(who)
    assert [(rank, size, local) for rank, size, local, _ in first] == [
        (0, 3, "0"),
        (1, 3, "1"),
        (2, 3, "2"),
    ]
    assert pool.run(group) == pool.pids()  # killed with what they have started
    assert [tensor.tolist() for tensor in pool.run(total, 10)] == [[33], [33], [33]]
    assert [pid for *_, pid in pool.run(who)] == [pid for *_, pid in first] == pool.pids()


def test_a_case_starts_from_the_same_seed(pool: RankPool) -> None:
    assert len(set(pool.run(random_number) + pool.run(random_number))) == 1


def test_the_fixture_gives_a_pool_of_each_size(ranks: Callable[..., list[Any]]) -> None:
    assert [t.item() for t in ranks(1, total, 5)] == [5]
    assert [t.item() for t in ranks(2, total, 5)] == [11, 11]


@pytest.mark.parametrize(
    ("function", "args", "timeout", "found"),
    [
        pytest.param(raise_on, (1,), 60, ["rank 1: raised", "ValueError", "the trouble of rank 1"]),
        pytest.param(sleep_on, (2,), 2, ["rank 2: did not answer", "about to sleep", "in sleep_on"]),
        pytest.param(die_on, (0,), 60, ["rank 0: was ended by SIGKILL"]),
        pytest.param(return_unpicklable, (), 60, ["rank 0: raised", "rank 2: raised", "lambda"]),
    ],
    ids=["raises", "hangs", "killed", "unpicklable"],
)
def test_failures_are_told_and_the_pool_recovers(
    pool: RankPool,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    timeout: float,
    found: list[str],
) -> None:
    pool.run(who)  # the clock below does not count the start
    pids = pool.pids()
    start = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        pool.run(function, *args, timeout=timeout)
    assert time.monotonic() - start < 15, "the other ranks were waited for"
    for text in found:
        assert text in str(caught.value)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    assert [tensor.item() for tensor in pool.run(total, 0)] == [3, 3, 3]


def test_a_worker_that_died_between_two_cases_is_reported_by_the_next(pool: RankPool) -> None:
    pool.run(who)
    os.kill(pool.pids()[1], signal.SIGKILL)
    with pytest.raises(RanksFailed, match="rank 1: was ended by SIGKILL"):
        pool.run(total, 0)


def test_a_start_that_is_interrupted_leaves_no_process_and_no_answer(forks: Forks) -> None:
    (one,) = run_ranks(who, 1, forks=forks)
    channel, answers = forks._channel, []

    def receive(length: int) -> bytes:
        answers.append(channel.recv(length))
        if len(answers) == 1:
            raise KeyboardInterrupt
        return answers[-1]

    with patch.object(forks, "_channel", Mock(sendmsg=channel.sendmsg, recv=receive)):
        with pytest.raises(KeyboardInterrupt):
            run_ranks(who, 1, forks=forks)
    (pid,) = [json.loads(answer)[1] for answer in answers[:1]]
    assert len(answers) == 2 and not psutil.pid_exists(pid)
    (other,) = run_ranks(who, 1, forks=forks)
    assert one[:3] == other[:3] and len({one[3], pid, other[3]}) == 3


def test_a_function_that_cannot_travel_is_refused_before_anything_starts() -> None:
    pool = RankPool(2)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pool.run(lambda: None)
    assert pool.pids() == []
    with pytest.raises(ValueError, match="world_size=0"):
        RankPool(0)


def test_run_ranks_leaves_no_process_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (pid,) = [pid for *_, pid in run_ranks(who, 1)]
    assert not psutil.pid_exists(pid)
    with pytest.raises(RanksFailed):
        run_ranks(raise_on, 1, 0)
    assert list(tmp_path.iterdir()) == []


def test_workers_leave_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = (
        "import os, signal\n"
        "from forks import Forks\n"
        "from ranks import RankPool\n"
        "from test_ranks import who\n"
        "forks = Forks()\n"
        "started, forked = RankPool(1), RankPool(2, forks)\n"
        "started.run(who), forked.run(who)\n"
        "print(*started.pids(), *forked.pids(), forks.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 4
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Is it there, and not just waiting for a new parent to take notice of its end?"""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
