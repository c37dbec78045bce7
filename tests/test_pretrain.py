"""The recipe end to end: real launchers and ranks, a tiny model, a little text.

Whatever can be asked of ranks that are running already is asked of the pool of `ranks.py`; starts,
kills and signals go through the real launchers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "launch" / "pretrain.py"
BIN = Path(sys.executable).parent
START_LIMIT = 150.0  # seconds for a start on a busy machine
STEPS = 12
# Ragged on purpose: 45 columns of the MLP's down projection leave a last unit of one element.
MODEL = {
    "hidden_size": 32,
    "intermediate_size": 45,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PARAMS: dict[str, Any] = {"lr": 0.01, "level": 2, "targets": ["attn", "mlp"]}
OPTIMIZER = {"type": "GWTAdamW", "params": PARAMS}
ENGINE = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
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
        "save_every": 4,
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


def torchrun() -> list[str]:
    rendezvous = ["--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    module = [sys.executable, "-m", "torch.distributed.run"]
    return [*module, *rendezvous, "--master_port", str(free_port()), str(SCRIPT)]


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


def curve(run: Path) -> list[list[Any]]:
    keys = ("step", "loss", "lr", "gradient_norm", "validation_loss", "bits_per_byte")
    return rows(run, *keys)


@pytest.fixture(scope="session")
def whole_run(inputs: Path, torch_extensions_dir: Path) -> tuple[Path, str]:
    """A run from start to end under the deepspeed launcher, and what it printed."""
    run = inputs / "whole"
    with started([*deepspeed_launcher(), *arguments(inputs, run)]) as process:
        code, output = finish(process)
    assert code == 0, output
    return run, output


def test_run_leaves_curve_checkpoints_and_summary(whole_run: tuple[Path, str]) -> None:
    run, output = whole_run
    training = [row for row in rows(run, "step", "loss", "tokens") if row[1] is not None]
    assert [row[0] for row in training] == list(range(1, STEPS + 1))
    assert training[-1][1] < training[0][1] - 0.5
    assert training[-1][2] == STEPS * 2 * 2 * 2 * 32
    validations = [row for row in rows(run, "step", "validation_loss", "bits_per_byte") if row[1]]
    assert [row[0] for row in validations] == [6, 12]
    # Each predicted token is a byte or the end of a document, which no byte of text stands for.
    assert 1.0 <= validations[-1][2] / (validations[-1][1] / math.log(2)) < 1.02
    kept = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert kept == ["step_00000008", "step_00000012"]
    assert list((run / "tensorboard").iterdir())
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["identity"]["optimizer.wavelet"] == "haar"
    assert record["train"]["steps"] == STEPS
    assert "GWTAdamW, 12 steps, 2 ranks" in output
    assert "Warning" not in output.replace("[WARNING]", ""), output


def matrix_elements_and_units() -> tuple[int, int]:
    """Of the Linear layers in attention and MLP, at level 2."""
    hidden, width = MODEL["hidden_size"], MODEL["intermediate_size"]
    shapes = [(hidden, hidden)] * 4 + [(width, hidden)] * 2 + [(hidden, width)]
    elements = sum(r * c for r, c in shapes)
    units = sum(r * math.ceil(c / 4) for r, c in shapes)
    return MODEL["num_hidden_layers"] * elements, MODEL["num_hidden_layers"] * units


def test_summary_counts_a_quarter_of_adamw(whole_run: tuple[Path, str]) -> None:
    run, output = whole_run
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    elements, units = matrix_elements_and_units()
    moments = sum(rank["wavelet_moments"] for rank in summary["ranks"])
    adamw = sum(rank["wavelet_adamw"] for rank in summary["ranks"])
    # DeepSpeed pads its buffer to an even share; a unit cut between two ranks is kept by both.
    assert 8 * elements <= adamw <= 8 * (elements + 4)
    assert 8 * units <= moments <= 8 * (units + 1)
    plain = [(rank["plain_moments"], rank["plain_adamw"]) for rank in summary["ranks"]]
    assert all(0.99 * adam <= have <= adam for have, adam in plain)
    assert f"{summary['ranks'][0]['wavelet_moments']:,}" in output
    assert 0 < summary["optimizer_time_share"] < 1
    assert summary["tokens_per_second"] > 0


def test_killed_and_resumed_run_has_the_same_curve(inputs: Path, whole_run: tuple[Path, str]) -> None:
    run = inputs / "killed"
    with started([*deepspeed_launcher(), *arguments(inputs, run)]) as process:
        wait_for(run / "checkpoints" / "step_00000004" / "run.json", process)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (run / "summary.json").exists()
    # What a kill while a line is written leaves behind.
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 12, "lo')
    with started([*torchrun(), *arguments(inputs, run, resume="latest")]) as process:
        code, output = finish(process)
    assert code == 0, output
    assert curve(run) == curve(whole_run[0])


ENDLESS = {"steps": 10**6, "save_every": 0, "eval_every": 0}


def wait_for_steps(run: Path, process: subprocess.Popen[str]) -> None:
    wait_for(run / "metrics.jsonl", process)
    while len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) < 3:
        assert process.poll() is None, finish(process)[1]
        time.sleep(0.01)


def check_stopped(run: Path, output: str) -> None:
    saved = [path.parent.name for path in (run / "checkpoints").glob("*/run.json")]
    assert len(saved) == 1, output
    step = int(saved[0].removeprefix("step_"))
    assert step >= 3 and rows(run, "step")[-1] == [step]


def test_ctrl_c_under_the_launcher_saves(inputs: Path, torch_extensions_dir: Path) -> None:
    run = inputs / "stopped"
    with started([*deepspeed_launcher(), *arguments(inputs, run, **ENDLESS)]) as process:
        wait_for_steps(run, process)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        code, output = finish(process, 60)  # until the ranks, which hold the pipe, have ended
    assert code != 0
    assert "stopped and saved at step" in output
    check_stopped(run, output)


def test_sigterm_saves_and_is_told_by_the_exit_code(inputs: Path, torch_extensions_dir: Path) -> None:
    run = inputs / "terminated"
    with started([sys.executable, str(SCRIPT), *arguments(inputs, run, **ENDLESS)]) as process:
        wait_for_steps(run, process)
        process.send_signal(signal.SIGTERM)
        code, output = finish(process, 60)
    assert code == 130, output
    check_stopped(run, output)


def test_one_plain_process_with_zero3_and_bpe(inputs: Path, torch_extensions_dir: Path) -> None:
    run = inputs / "plain"
    settings = engine(inputs, "zero3", zero_optimization={"stage": 3})
    changes = {"deepspeed_config": settings, "tokenizer": "bpe:300", "steps": 3}
    command = [sys.executable, str(SCRIPT), *arguments(inputs, run, **changes)]
    with started(command) as process:
        code, output = finish(process)
    assert code == 0, output
    assert (run / "tokenizer.json").is_file()
    tokens, bits = rows(run, "validation_loss", "bits_per_byte")[-1]
    assert bits < tokens / math.log(2)  # a token is more than a byte


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
    from gwt_dist.train.summary import OptimizerWatch, measure

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
        if calls % 2:
            weights[:] = [snapshot()]  # before each step: two micro-batches make one
        # Rank 1 alone sees it, in the first micro-batch of step 3.
        return losses * float(probe) if rank == world_size - 1 and calls == 5 else losses

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
        result["bytes"] = dataclasses.asdict(measure(engine, watch))
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
        return run_session(argv)


def test_streamed_run_goes_on_in_another_folder_with_the_same_curve(
    inputs: Path, ranks: Ranks, torch_extensions_dir: Path, tmp_path: Path
) -> None:
    changes = {"corpus": "some/dataset", "steps": 6, "save_every": 3, "shuffle_buffer": 20}
    files = str(inputs / "text" / "*.txt")
    whole, branch = tmp_path / "whole", tmp_path / "branch"
    ranks(2, run_streamed, arguments(inputs, whole, **changes), files, timeout=120)
    changes["resume"] = whole / "checkpoints" / "step_00000003"
    ranks(2, run_streamed, arguments(inputs, branch, **changes), files, timeout=120)
    assert len(curve(whole)) == 7  # six steps and a validation
    assert curve(branch) == curve(whole)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_loss_that_is_not_finite_stops_before_the_weights_change(
    inputs: Path, ranks: Ranks, torch_extensions_dir: Path, tmp_path: Path, value: str
) -> None:
    run = tmp_path / "run"
    results = ranks(2, run_session, arguments(inputs, run), value, timeout=120)
    for result in results:
        # inf of one rank stays inf in the mean.
        assert re.search(rf"the loss is {value} at step 3;.* nothing was saved yet", result["raised"])
        assert result["changed"] is False
        assert result["calls"] == 6  # both micro-batches, no step
    assert [row[0] for row in rows(run, "step")] == [1, 2]
    assert not (run / "checkpoints").exists()


def test_validation_does_not_depend_on_ranks_or_stage(
    inputs: Path, ranks: Ranks, torch_extensions_dir: Path, tmp_path: Path
) -> None:
    """After no step but the first, at learning rate 0: initial weights and windows are compared."""
    losses = []
    for world_size, stage in ((1, 1), (2, 1), (2, 3)):
        still = {"type": "GWTAdamW", "params": {"lr": 0.0}}
        settings = engine(inputs, f"still{stage}", zero_optimization={"stage": stage}, optimizer=still)
        argv = arguments(inputs, tmp_path / f"{world_size}-{stage}", deepspeed_config=settings, steps=2)
        results = ranks(world_size, run_session, argv, timeout=120)
        assert len({result["validation_loss"] for result in results}) == 1
        losses.append(results[0]["validation_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2-bf16", "zero2-adamw"])
def test_each_engine_setting_trains(
    inputs: Path, ranks: Ranks, torch_extensions_dir: Path, tmp_path: Path, name: str
) -> None:
    settings = REPOSITORY / "configs" / f"{name}.json"
    argv = arguments(inputs, tmp_path / "run", deepspeed_config=settings, steps=3)
    results = ranks(2, run_session, argv, timeout=120)
    assert math.isfinite(results[0]["validation_loss"])
    elements, units = matrix_elements_and_units()
    held = [result["bytes"] for result in results]
    moments = sum(one["wavelet_moments"] for one in held)
    if name == "zero2-adamw":
        assert moments == 0 and results[0]["planned"] is None
        assert all(one["plain_moments"] == one["plain_adamw"] for one in held)
        return
    for result in results:
        measured, planned = result["bytes"], result["planned"]
        assert measured["wavelet_moments"] == planned["wavelet"]
        assert measured["plain_moments"] == planned["rest"]
        assert measured["scalars"] == planned["scalars"]
    assert moments == 8 * units + sum(result["planned"]["wavelet_cut"] for result in results)
    # ZeRO-1/2 cut one buffer, ZeRO-3 each of the seven matrices of a layer.
    cuts = 7 * MODEL["num_hidden_layers"] if name == "zero3" else 1
    assert 8 * units <= moments <= 8 * (units + cuts)
    adamw = sum(one["wavelet_adamw"] for one in held)
    assert 8 * elements <= adamw <= 8 * (elements + 4 * cuts)
    # ZeRO-1/2 keep the weights on both ranks and divide the fp32 masters; ZeRO-3 divides both.
    weights = sum(one["weights"] for one in held)
    masters = sum(one["masters"] for one in held)
    copies = {"zero3": 1.0, "zero2-bf16": 2 * 0.5}.get(name, 2.0)
    assert weights / masters == pytest.approx(copies, rel=0.001)


def fails(argv: list[str]) -> tuple[int, str]:
    """Exit code and stderr of the command, in a rank of the pool, which stays usable."""
    from gwt_dist.train import command

    errors = io.StringIO()
    with mock.patch.object(command, "_leave"), contextlib.redirect_stderr(errors):
        code = command.main(argv)
    return code, errors.getvalue()


def optimizer(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "GWTAdamW", "params": PARAMS | params}}


@pytest.mark.parametrize(
    ("changes", "engine_changes", "message"),
    [
        ({"stepz": 3}, {}, "'--stepz' in the command line"),
        ({"corpus": "/nowhere"}, {}, "corpus '/nowhere': no such folder"),
        ({"model": "huge"}, {}, "no such configuration file: 'huge'"),
        ({"resume": "latest"}, {}, "no complete checkpoint in"),
        ({}, {"train_batch_size": 7}, "2 ranks = 8, but train_batch_size = 7"),
        ({}, {"gradient_cliping": 1}, "'gradient_cliping'"),
        ({}, optimizer(levels=2), "'levels'"),
        ({}, optimizer(level=17), "level"),
        ({}, optimizer(wavelet="haaar"), "haaar"),
        ({}, optimizer(recipe="secret"), "recipe"),
        ({}, optimizer(targets=["conv"]), "'conv' matches no Linear weight"),
    ],
)
def test_bad_input_is_one_error_and_writes_nothing(
    inputs: Path,
    ranks: Ranks,
    torch_extensions_dir: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    engine_changes: dict[str, Any],
    message: str,
) -> None:
    settings = engine(tmp_path, "engine", **engine_changes)
    run = tmp_path / "run"
    argv = arguments(inputs, run, **{"deepspeed_config": settings} | changes)
    (code0, error), (code1, silent) = ranks(2, fails, argv, timeout=120)
    assert (code0, code1) == (2, 2)
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert silent == ""
    assert not run.exists()


@pytest.mark.parametrize(
    ("changes", "engine_changes", "message"),
    [
        ({}, optimizer(level=3), "optimizer.level is 3 in this run and 2 in"),
        ({}, optimizer(wavelet="db2"), "optimizer.wavelet is 'db2' in this run and 'haar' in"),
        ({}, optimizer(recipe="energy"), "optimizer.recipe is 'energy' in this run and 'paper'"),
        ({}, {"zero_optimization": {"stage": 1}}, "zero_stage is 1 in this run and 2 in"),
        ({"sequence_length": 16}, {}, "sequence_length is 16 in this run and 32 in"),
        ({"model": "tiny"}, {}, r"model.hidden_size is 192 in this run and 32 in"),
        ({"corpus": "{inputs}/text/0*.txt"}, {}, "corpus.sha256 is"),
        ({"steps": STEPS}, {}, "at step 12 already; raise steps"),
        ({"resume": ""}, {}, "is not empty and nothing in it is overwritten"),
    ],
)
def test_resume_of_another_run_is_refused(
    inputs: Path,
    whole_run: tuple[Path, str],
    ranks: Ranks,
    tmp_path: Path,
    changes: dict[str, Any],
    engine_changes: dict[str, Any],
    message: str,
) -> None:
    run, _ = whole_run
    before = sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*"))
    settings = engine(tmp_path, "engine", **engine_changes)
    values: dict[str, Any] = {"deepspeed_config": settings, "resume": "latest", "steps": 20} | changes
    values = {k: v.format(inputs=inputs) if k == "corpus" else v for k, v in values.items()}
    (code, error), _ = ranks(2, fails, arguments(inputs, run, **values), timeout=120)
    assert code == 2 and error.count("\n") == 1
    assert message in error
    assert sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*")) == before


def test_resume_with_another_number_of_ranks_is_refused(
    inputs: Path, whole_run: tuple[Path, str], ranks: Ranks
) -> None:
    argv = arguments(inputs, whole_run[0], resume="latest", steps=20)
    code, error = ranks(1, fails, argv, timeout=120)[0]
    assert code == 2
    assert "world_size is 1 in this run and 2 in" in error
