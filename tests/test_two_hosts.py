"""The launchers of `launch/` between two hosts, as `two_hosts.py` makes them, and one host that goes away."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

import fsdp2_cases
import zero_cases
from pretrain_cases import Ranks, arguments, curve, run_session, wait_for
from two_hosts import INTERFACE, REPOSITORY, Host, start_sshd, two_hosts, why_not
from two_hosts_job import LEVEL, RECIPE, STEPS

JOB = str(REPOSITORY / "tests" / "two_hosts_job.py")
LAUNCH = REPOSITORY / "launch"
SECONDS = 80.0
# Between the hosts: one waits for a call and greets, the other calls until it hears something, or gives up.
GREET = """
import socket
with socket.create_server(("10.77.0.2", 7000)) as server:
    server.settimeout(10)
    with server.accept()[0] as call:
        call.sendall(b"hello")
"""
CALL = """
import socket, sys, time
limit = time.monotonic() + float(sys.argv[1])
while time.monotonic() < limit:
    try:
        with socket.create_connection(("node1", 7000), timeout=2) as call:
            print(call.recv(5).decode())
            break
    except OSError:
        time.sleep(0.1)
else:
    print("no answer")
"""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    with two_hosts(tmp_path) as both:
        yield both


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"there is no program {program}: see .ci/run for what installs it")


def finish(processes: list[subprocess.Popen[str]], seconds: float = SECONDS) -> list[tuple[int, str]]:
    """Exit codes and outputs; those that run too long are killed."""
    limit = time.monotonic() + seconds
    found = []
    for process in processes:
        try:
            output, _ = process.communicate(timeout=max(limit - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            output = f"killed after {seconds} s"
        found.append((process.returncode if process.returncode is not None else -9, output))
    return found


Where = list[tuple[str, tuple[int, int, int]]]  # of each rank: host; rank, world size, local rank


def check(processes: list[subprocess.Popen[str]], folder: Path, expected: Where) -> None:
    """All ended well, the ranks were where they should be, and each has the weights of one process."""
    outcomes = finish(processes)
    assert [code for code, _ in outcomes] == [0] * len(processes), "\n".join(output for _, output in outcomes)
    results = [torch.load(folder / f"rank{rank}.pt") for rank in range(len(expected))]
    assert [(result["host"], result["ranks"]) for result in results] == expected
    assert not any(result["address"].startswith("127.") for result in results)
    shapes = zero_cases.shapes_of(zero_cases.Net())
    start = zero_cases.initial(shapes)
    references = {
        "zero2": (zero_cases.reference(LEVEL, RECIPE, STEPS), 1e-6),
        "fsdp2": (fsdp2_cases.reference(LEVEL, RECIPE, "haar", STEPS, ""), 1e-12),
    }
    for result in results:
        for engine, (reference, tolerance) in references.items():
            assert set(result[engine]) == set(shapes)
            for name, found in result[engine].items():
                change = (reference[name] - start[name]).abs().max()
                assert float((found - reference[name]).abs().max() / change) < tolerance, (engine, name)


def hostfile(hosts: list[Host], *slots: int) -> str:
    path = hosts[0].folder / "hostfile"
    path.write_text("".join(f"{h.name} slots={n}\n" for h, n in zip(hosts, slots, strict=True)), encoding="utf-8")
    return str(path)


def test_hosts_are_apart_and_joined_by_a_cable_that_can_be_cut(hosts: list[Host]) -> None:
    assert [host.run("hostname") for host in hosts] == ["node0\n", "node1\n"]
    assert "sleep" not in hosts[1].run("sh", "-c", "cat /proc/[0-9]*/comm")
    hosts[0].start(["sleep", "1000"])
    assert "sleep" not in hosts[1].run("sh", "-c", "cat /proc/[0-9]*/comm")
    listen = hosts[1].start([sys.executable, "-c", GREET])
    assert hosts[0].run(sys.executable, "-c", CALL, "10") == "hello\n"
    assert listen.wait(10) == 0
    hosts[1].cut()
    assert "no answer" in hosts[0].run(sys.executable, "-c", CALL, "1")


def test_nothing_is_left_of_hosts_whose_test_is_killed(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    code = (
        "import sys, time, pathlib, two_hosts\n"
        "with two_hosts.two_hosts(pathlib.Path(sys.argv[1])) as hosts:\n"
        "    process = hosts[1].start(['sleep', '1000'])\n"
        "    print(*(host.pid for host in hosts), process.pid, flush=True)\n"
        "    time.sleep(1000)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    ) as test:
        assert test.stdout is not None
        processes = [psutil.Process(int(pid)) for pid in test.stdout.readline().split()]
        processes += [child for process in processes[:2] for child in process.children(recursive=True)]
        assert len(processes) == 5  # two hosts, each with its `cat`, and what was started
        test.kill()
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive


ONE_EACH: Where = [("node0", (0, 2, 0)), ("node1", (1, 2, 0))]


@pytest.mark.matrix
@pytest.mark.support("DeepSpeed", "two hosts, by torchrun, mpirun and the deepspeed launcher")
@pytest.mark.support("FSDP2", "two hosts, by torchrun, mpirun and the deepspeed launcher")
class TestLaunchers:
    def test_torchrun(self, hosts: list[Host], torch_extensions_dir: Path) -> None:
        command = [str(LAUNCH / "torchrun.sh"), str(hosts[0].folder)]
        settings = {"NNODES": "2", "MASTER_ADDR": "node0", "SCRIPT": JOB}
        processes = [host.start(command, **settings, NODE_RANK=str(number)) for number, host in enumerate(hosts)]
        check(processes, hosts[0].folder, ONE_EACH)

    def test_mpirun(self, hosts: list[Host], torch_extensions_dir: Path) -> None:
        needs("mpirun", "prted")
        start_sshd(hosts)
        settings = {"HOSTFILE": hostfile(hosts, 2, 1), "INTERFACE": INTERFACE, "SCRIPT": JOB}
        process = hosts[0].start([str(LAUNCH / "mpirun.sh"), str(hosts[0].folder)], **settings)
        expected = [("node0", (0, 3, 0)), ("node0", (1, 3, 1)), ("node1", (2, 3, 0))]
        check([process], hosts[0].folder, expected)

    @pytest.mark.parametrize("runner", ["pdsh", "openmpi"])
    def test_deepspeed(self, hosts: list[Host], torch_extensions_dir: Path, runner: str) -> None:
        needs(*{"pdsh": ["pdsh"], "openmpi": ["mpirun", "ompi_info"]}[runner])
        start_sshd(hosts)
        folder = hosts[0].folder
        shared = {k: v for k, v in hosts[0].environment().items() if not k.startswith(("PYTHON", "HOME", "LANG"))}
        lines = "".join(f"{name}={value}\n" for name, value in shared.items() if value)
        (folder / ".deepspeed_env").write_text(lines, encoding="utf-8")
        settings = {"HOSTFILE": hostfile(hosts, 1, 1), "RUNNER": runner, "INTERFACE": INTERFACE, "SCRIPT": JOB}
        process = hosts[0].start([str(LAUNCH / "deepspeed.sh"), str(folder)], **settings)
        check([process], folder, ONE_EACH)


TIMEOUT = 10  # seconds that a rank waits for another
STEPS_OF_RUN = 40


@pytest.mark.matrix
def test_host_that_is_cut_off_ends_the_run_which_goes_on_later(
    hosts: list[Host], inputs: Path, ranks: Ranks, torch_extensions_dir: Path, tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    changes = {"steps": STEPS_OF_RUN, "save_every": 5, "eval_every": 20, "timeout": TIMEOUT}

    def start(meet: dict[str, str], **more: str) -> list[subprocess.Popen[str]]:
        command = [str(LAUNCH / "torchrun.sh"), *arguments(inputs, run, **changes, **more)]
        return [host.start(command, **meet, NNODES="2", NODE_RANK=str(n)) for n, host in enumerate(hosts)]

    processes = start({"MASTER_ADDR": "node0"})
    wait_for(run / "checkpoints" / "step-00000005", processes[0], SECONDS)
    hosts[1].cut()
    cut = time.monotonic()
    outcomes = finish(processes, 2 * TIMEOUT + 15)
    seconds = time.monotonic() - cut
    assert all(code not in (0, -9) for code, _ in outcomes), "\n".join(output for _, output in outcomes)
    print(f"both ended {seconds:.1f} s after the cut; a rank waits {TIMEOUT} s")
    assert not (run / "summary.json").exists()

    hosts[1].mend()
    outcomes = finish(start({"RDZV_ENDPOINT": "node0:29400"}, resume="latest"))
    assert [code for code, _ in outcomes] == [0, 0], "\n".join(output for _, output in outcomes)
    ranks(2, run_session, arguments(inputs, whole, **changes), timeout=120)
    assert len(curve(whole)) == STEPS_OF_RUN + 2
    assert curve(run) == curve(whole)
