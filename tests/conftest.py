"""Fixtures for all tests: real ranks, a folder for compiled extensions, and a clean end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch

import support
from forks import Forks
from gwt_dist.kernels import cpu
from gwt_dist.recipes import program_of
from pretrain_cases import inputs, whole_run  # noqa: F401
from ranks import RankPool

# Tests never reach out: a model or data set that is not here is an error, not a download.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

# Ranks and a compiler run beside this process, and two threads that share a core wait for each other: tensors of the
# tests are small. That bits do not depend on threads has a test of its own in `test_kernels.py`.
torch.set_num_threads(1)

# DeepSpeed compiles with the `ninja` that it finds first; another one would compile everything again.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

# Compiled extensions go to a folder of this session, set before anything can import DeepSpeed: a
# rank killed while it compiles leaves a lock behind, on which every later run would wait for ever.
# Who sets the variable keeps what was compiled there, half a minute a run.
_extensions = tempfile.TemporaryDirectory(prefix="gwt_dist-extensions-")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", _extensions.name)


_BEGUN = time.monotonic()
# Where the machine is slow, what would end too late is skipped, and the summary says so.
_SECONDS = float(os.environ.get("GWT_TEST_SECONDS", "inf"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - _BEGUN > _SECONDS:
        pytest.skip(f"GWT_TEST_SECONDS={_SECONDS:.0f} are over: this machine was too slow for all tests")


@pytest.fixture(scope="session", autouse=True)
def nothing_left_over() -> Iterator[None]:
    """At the end of the session no process that the tests started is still there."""
    yield
    # multiprocessing's tracker lives as long as its parent, by design.
    children = [
        child
        for child in psutil.Process().children(recursive=True)
        if "multiprocessing.resource_tracker" not in " ".join(_command(child))
    ]
    _, alive = psutil.wait_procs(children, timeout=5)
    left = {child.pid: " ".join(_command(child)) for child in alive}
    for child in alive:
        child.kill()
    _extensions.cleanup()
    assert not left, f"processes left over by the tests (killed now): {left}"


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(scope="session")
def forks(nothing_left_over: None, request: pytest.FixtureRequest) -> Iterator[Forks]:
    """Forks ranks off a process that has imported what they need."""
    for group in GROUPS:  # before the time of a test with ranks runs
        cpu.prepare(program_of(group, level=1))
    modules = ["gwt_dist", "torch.distributed.fsdp"]
    if _need_extensions(request.session):
        modules += ["deepspeed", "gwt_dist.train.session", "torch.utils.tensorboard", "transformers.models.llama"]
    forks = Forks(*modules)
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def interpreted(nothing_left_over: None) -> Iterator[Callable[..., Any]]:
    """Runs a case in a process of its own, where Triton interprets kernels; other tests keep their compiler."""
    pytest.importorskip("triton")
    pool = RankPool(1)

    def run(function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> Any:
        with patch.dict(os.environ, TRITON_INTERPRET="1"):
            return pool.run(function, *args, timeout=timeout)[0]

    yield run
    pool.close()


@pytest.fixture(scope="session")
def _rank_pools(forks: Forks) -> Iterator[dict[int, RankPool]]:
    pools: dict[int, RankPool] = {}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture
def ranks(_rank_pools: dict[int, RankPool], forks: Forks) -> Callable[..., list[Any]]:
    """`ranks(world_size, function, *args, timeout=60)`: one result a rank; see `ranks.py`."""

    def run(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        pool = _rank_pools.setdefault(world_size, RankPool(world_size, forks))
        return pool.run(function, *args, timeout=timeout)

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-support", action="store_true", help="write the support matrix of docs/engines.md")


_failed: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.outcome != "passed":
        _failed.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--write-support"):
        support.write(support.table(support.rows_of(session.items), _failed))


# Files whose tests take no step.
WITHOUT_KERNELS = (
    "cli",
    "docker",
    "imports",
    "launchers",
    "packaging",
    "plan_command",
    "readme",
    "tokens",
    "train_config",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """While the kernels are compiled on the other core come tests without them, and DeepSpeed's after all others."""
    items.sort(
        key=lambda item: (
            "torch_extensions_dir" in getattr(item, "fixturenames", ()),
            item.path.stem.removeprefix("test_") not in WITHOUT_KERNELS,
        )
    )


def _need_extensions(session: pytest.Session) -> bool:
    return any("torch_extensions_dir" in getattr(item, "fixturenames", ()) for item in session.items)


# The kernels of the recipes that most tests are about; others are compiled when a test comes to them.
GROUPS: tuple[dict[str, str], ...] = ({"recipe": "energy"}, {"recipe": "paper"})
BUILD = (
    "from gwt_dist.kernels import cpu\n"
    "from gwt_dist.recipes import program_of\n"
    f"for group in {GROUPS}:\n"
    "    cpu.prepare(program_of(group, level=1))\n"
)
BUILD_OF_DEEPSPEED = (
    "import deepspeed\n"
    "from deepspeed.accelerator import get_accelerator\n"
    "builder = get_accelerator().create_op_builder('ShareMemCommBuilder')\n"
    "if builder is not None and deepspeed.ops.__compatible_ops__.get(builder.NAME):\n"
    "    builder.load()\n"
)


@pytest.fixture(scope="session", autouse=True)
def _extension_build(nothing_left_over: None, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """Starts to compile the kernels of a CPU, and what `deepspeed.init_distributed` needs if any test of this session
    does. Who comes to use the kernels meanwhile waits for them.
    """
    build = subprocess.Popen(
        [sys.executable, "-c", BUILD + (BUILD_OF_DEEPSPEED if _need_extensions(request.session) else "")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    yield build
    if build.poll() is None:
        os.killpg(build.pid, signal.SIGKILL)
    build.wait()
    assert build.stdout is not None
    build.stdout.close()


@pytest.fixture(scope="session")
def torch_extensions_dir(_extension_build: subprocess.Popen[str]) -> Path:
    """The folder of compiled extensions, with what `deepspeed.init_distributed` needs in it.

    DeepSpeed compiles its shared-memory op on first use, for half a minute. Built once, before any test needs it, it
    neither counts against the time limit of a case nor is compiled by all ranks at once.
    """
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    try:
        output, _ = _extension_build.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        locks = ", ".join(map(str, folder.glob("*/lock"))) or "none"
        pytest.fail(f"DeepSpeed's op was not built within 240 s; lock files in its way: {locks}")
    assert _extension_build.returncode == 0, f"DeepSpeed's op does not build:\n{output}"
    return folder
