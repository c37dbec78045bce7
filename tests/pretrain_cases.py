"""What the tests of the recipe share: a tiny model and text, real starts, and runs on the ranks of a pool."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from gwt_dist.train.metrics import TIMINGS

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "launch" / "pretrain.py"
BIN = Path(sys.executable).parent
START_LIMIT = 150.0  # seconds for a start on a busy machine
STEPS = 12
SEQUENCES = 12  # in a step: 2 at once, 3 times, on 2 ranks; 1 and 3 ranks can share them too
# Ragged on purpose: 45 columns of the MLP's down projection leave a last unit of one element.
MODEL = {
    "hidden_size": 32,
    "intermediate_size": 45,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PARAMS: dict[str, Any] = {"lr": 0.01, "level": 2, "targets": ["attn", "mlp"], "recipe": "paper"}
OPTIMIZER = {"type": "GWTAdamW", "params": PARAMS}
ENGINE = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 3,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
    "optimizer": OPTIMIZER,
}

Ranks = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, model and engine settings."""
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "text").mkdir()
    for i in range(30):
        text = "".join(f"{i * j} times {j} is {i * j * j}.\n" for j in range(40))
        (folder / "text" / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    (folder / "model.json").write_text(json.dumps(MODEL), encoding="utf-8")
    engine(folder, "zero2")
    return folder


def engine(folder: Path, name: str, **changes: Any) -> str:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(ENGINE | changes), encoding="utf-8")
    return str(path)


def arguments(folder: Path, output: Path, **changes: Any) -> list[str]:
    values: dict[str, Any] = {
        "model": folder / "model.json",
        "corpus": folder / "text",
        "deepspeed_config": folder / "zero2.json",
        "output": output,
        "sequence_length": 32,
        "steps": STEPS,
        "warmup_steps": 2,
        "eval_every": 6,
        "eval_tokens": 32 * 7,
        "log_every": 1,
        "save_every": 7,  # at a step whose micro-batches are no whole number of steps on 1 rank
        "threads": 1,
    }
    return [f"--{key}={value}" for key, value in (values | changes).items()]


# ---- real starts


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A command in a process group of its own, of which nothing is left afterwards."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "RANK"))}
    environment |= {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def deepspeed_launcher() -> list[str]:
    address = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return [str(BIN / "deepspeed"), "--num_accelerators", "2", *address, str(SCRIPT)]


def torchrun(world_size: int = 2, restarts: int = 0) -> list[str]:
    module = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*module, "--nproc-per-node", str(world_size), "--max-restarts", str(restarts), str(SCRIPT)]


def finish(process: subprocess.Popen[str], seconds: float = START_LIMIT) -> tuple[int, str]:
    """Exit code and output."""
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = START_LIMIT) -> None:
    limit = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, f"ended before {path} was there:\n{finish(process)[1]}"
        assert time.monotonic() < limit, f"no {path} after {seconds} s"
        time.sleep(0.005)


def rows(run: Path, *keys: str) -> list[list[Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [[row.get(key) for key in keys] for row in map(json.loads, lines)]


def curve(run: Path) -> list[dict[str, Any]]:
    """All that is logged but the speed."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]


@pytest.fixture(scope="session")
def whole_run(inputs: Path, torch_extensions_dir: Path) -> tuple[Path, str]:
    """A run from start to end under the deepspeed launcher, and what it printed."""
    run = inputs / "whole"
    with started([*deepspeed_launcher(), *arguments(inputs, run)]) as process:
        code, output = finish(process)
    assert code == 0, output
    return run, output


# ---- ranks of the pool


def run_session(argv: list[str], probe: str = "") -> dict[str, Any]:
    """One run on the ranks of a pool: losses, weights and what was raised, as plain data.

    `probe`: a number that the loss is multiplied by, once on the last rank.
    """
    import torch

    from gwt_dist.train import loop, model
    from gwt_dist.train.config import parse_arguments
    from gwt_dist.train.ranks import ranks_from_environment
    from gwt_dist.train.session import open_session
    from gwt_dist.train.summary import measure
    from gwt_dist.train.watch import OptimizerWatch

    config, _ = parse_arguments(argv)
    session = open_session(config, ranks_from_environment(None))
    engine, rank, world_size = session.engine, session.ranks.rank, session.ranks.world_size
    weights: list[torch.Tensor] = []

    def snapshot() -> torch.Tensor:
        return torch.cat([p.detach().flatten().clone() for p in engine.module.parameters()])

    calls = 0
    healthy = model.token_losses

    def failing(module: Any, tokens: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        losses = healthy(module, tokens)
        if calls % 3 == 1:
            weights[:] = [snapshot()]  # before each step: three micro-batches make one
        # Rank 1 alone sees it, in the first micro-batch of step 3.
        return losses * float(probe) if rank == world_size - 1 and calls == 7 else losses

    raised = ""
    with contextlib.ExitStack() as stack:
        if probe:
            stack.enter_context(mock.patch.object(loop, "token_losses", failing))
        try:
            watch = OptimizerWatch(engine)
            outcome = loop.train(session, watch)
        except loop.NonFiniteLoss as error:
            raised = str(error)
    session.metrics.close()
    result: dict[str, Any] = {"raised": raised, "changed": None}
    if raised:
        result["changed"] = not torch.equal(weights[0], snapshot())
        result["calls"] = calls
    else:
        result["validation_loss"] = outcome.validation_loss
        result["bytes"] = dataclasses.asdict(measure(list(engine.module.parameters()), watch))
        result["planned"] = session.planned and dataclasses.asdict(session.planned)
    engine.destroy()
    return result


def run_streamed(argv: list[str], files: str) -> dict[str, Any]:
    """`run_session`, with local files in the place of a dataset that would be fetched."""
    import datasets

    from gwt_dist.train import stream

    def local(spec: str) -> tuple[Any, None]:
        splits = datasets.load_dataset("text", data_files=files, streaming=True)
        return splits["train"], None

    with mock.patch.object(stream, "open_stream", local):
        try:
            return run_session(argv)
        except ValueError as error:
            return {"refused": str(error)}


def fails(argv: list[str], restarts: int = 0) -> tuple[int, str]:
    """Exit code and output of the command, in a rank of the pool, which stays usable."""
    from gwt_dist.train import command, ranks

    told = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(command, "_leave"))
        stack.enter_context(mock.patch.dict(os.environ, {ranks.MAX_RESTARTS: str(restarts)}))
        stack.enter_context(contextlib.redirect_stderr(told))
        stack.enter_context(contextlib.redirect_stdout(told))
        code = command.main(argv)
    return code, told.getvalue()


def optimizer(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "GWTAdamW", "params": PARAMS | params}}
