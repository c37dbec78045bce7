"""The launchers of `launch/` between two hosts, as `two_hosts.py` makes them, and one host that goes away."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fsdp2_cases
import pretrain_cases
import zero_cases
from pretrain_cases import Ranks, arguments, curve, inputs, run_session
from two_hosts import BIN, INTERFACE, REPOSITORY, Host, start_sshd, two_hosts
from two_hosts_job import LEVEL, RECIPE, STEPS

__all__ = ["inputs"]  # a fixture
pytestmark = pytest.mark.matrix
JOB = str(REPOSITORY / "tests" / "two_hosts_job.py")
LAUNCH = REPOSITORY / "launch"
SECONDS = 80.0


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


def check(processes: list[subprocess.Popen[str]], folder: Path, expected: list[tuple[str, tuple[int, int, int]]]) -> None:
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


ONE_EACH = [("node0", (0, 2, 0)), ("node1", (1, 2, 0))]


@pytest.mark.support("DeepSpeed", "two hosts, by torchrun, mpirun and the deepspeed launcher")
@pytest.mark.support("FSDP2", "two hosts, by torchrun, mpirun and the deepspeed launcher")
class TestLaunchers:
    @pytest.mark.parametrize("rendezvous", ["address of node 0", "endpoint"])
    def test_torchrun(self, hosts: list[Host], torch_extensions_dir: Path, rendezvous: str) -> None:
        settings = {"NNODES": "2", "SCRIPT": JOB}
        if rendezvous == "endpoint":
            settings["RDZV_ENDPOINT"] = "node0:29400"
        else:
            settings["MASTER_ADDR"] = "node0"
        processes = []
        for number, host in enumerate(hosts):
            command = [str(LAUNCH / "torchrun.sh"), str(host.folder)]
            processes.append(host.start(command, **settings, NODE_RANK=str(number)))
        if rendezvous == "endpoint":  # which of the two is rank 0 is for torchrun to say
            assert [code for code, _ in (outcomes := finish(processes))] == [0, 0], outcomes
            first = torch.load(hosts[0].folder / "rank0.pt")["host"]
            other = {"node0": "node1", "node1": "node0"}[first]
            check([], hosts[0].folder, [(first, (0, 2, 0)), (other, (1, 2, 0))])
        else:
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
