"""The recipe end to end: real launchers and ranks, a tiny model, a little text. `test_resume.py` is about going on.

Whatever can be asked of ranks that are running already is asked of the pool of `ranks.py`; starts, kills and signals go
through the real launchers.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gwt_dist.checkpoint import checkpoints, find, read_index
from pretrain_cases import (
    MODEL,
    REPOSITORY,
    SCRIPT,
    SEQUENCES,
    STEPS,
    Ranks,
    arguments,
    curve,
    deepspeed_launcher,
    engine,
    fails,
    finish,
    optimizer,
    rows,
    run_session,
    started,
    wait_for,
)


def test_run_leaves_curve_checkpoints_and_summary(whole_run: tuple[Path, str]) -> None:
    run, output = whole_run
    training = [row for row in rows(run, "step", "loss", "tokens") if row[1] is not None]
    assert [row[0] for row in training] == list(range(1, STEPS + 1))
    assert training[-1][1] < training[0][1] - 0.5
    assert training[-1][2] == STEPS * SEQUENCES * 32
    validations = [row for row in rows(run, "step", "validation_loss", "bits_per_byte") if row[1]]
    assert [row[0] for row in validations] == [6, 12]
    # Each predicted token is a byte or the end of a document, which no byte of text stands for.
    assert 1.0 <= validations[-1][2] / (validations[-1][1] / math.log(2)) < 1.02
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-00000007", "step-00000012"]
    index = read_index(find(run / "checkpoints", "latest")[0])
    assert index.extra["model_config"]["intermediate_size"] == MODEL["intermediate_size"]
    assert index.extra["batch"] == {"sequences": SEQUENCES, "ranks": 2} and index.extra["streams"] is None
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


def test_limiter_norms_and_times_are_logged(whole_run: tuple[Path, str]) -> None:
    """The norms are those of the checkpoints; each tensor grew by 1.01 at most, and just so where it was held back."""
    run, _ = whole_run
    lines = {row["step"]: row for row in curve(run) if "loss" in row}
    kept = {step: read_index(run / "checkpoints" / f"step-{step:08}") for step in (7, 12)}
    for step, index in kept.items():
        norms = [norm for entry in index.tensors.values() if (norm := entry.numbers.get("limited_norm"))]
        assert len(norms) == 7 * MODEL["num_hidden_layers"]
        assert lines[step]["limited_norm_mean"] == pytest.approx(sum(norms) / len(norms), rel=1e-12)
        assert lines[step]["limited_norm_max"] == max(norms)
    shares = [lines[step]["limited_share"] for step in range(1, STEPS + 1)]
    assert shares[0] == 0 and len(set(shares)) > 2
    assert all(share == pytest.approx(round(share * len(norms)) / len(norms)) for share in shares)
    for step in range(2, STEPS + 1):
        grown = lines[step]["limited_norm_mean"] / lines[step - 1]["limited_norm_mean"]
        assert grown <= 1.01 + 1e-6
        assert (grown > 1.01 - 1e-6) == (shares[step - 1] == 1)
    seconds = [times for (times,) in rows(run, "seconds")]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    phases = [set(times) for times in seconds]
    assert phases[0] == {"first step"}
    step = {"data", "forward", "backward", "optimizer", "engine", "other"}
    assert all(step <= found for found in phases[1:6]) and {"evaluation"} < phases[6]
    assert "checkpoint" in phases[8] and set(summary["seconds_after_last_line"]) == {"checkpoint", "other"}
    assert all(0 <= time < 60 for times in seconds for time in times.values())


ENDLESS = {"steps": 10**6, "save_every": 0, "eval_every": 0}


def wait_for_steps(run: Path, process: subprocess.Popen[str]) -> None:
    wait_for(run / "metrics.jsonl", process)
    while len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) < 3:
        assert process.poll() is None, finish(process)[1]
        time.sleep(0.01)


def check_stopped(run: Path, output: str) -> None:
    saved = checkpoints(run / "checkpoints")
    assert len(saved) == 1, output
    step = int(saved[0].name.removeprefix("step-"))
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


def test_one_plain_process_with_zero3_and_bpe_saves_on_sigterm(inputs: Path, torch_extensions_dir: Path) -> None:
    run = inputs / "plain"
    settings = engine(inputs, "zero3", zero_optimization={"stage": 3})
    changes = ENDLESS | {"deepspeed_config": settings, "tokenizer": "bpe:300", "eval_every": 2}
    with started([sys.executable, str(SCRIPT), *arguments(inputs, run, **changes)]) as process:
        wait_for_steps(run, process)
        process.send_signal(signal.SIGTERM)
        code, output = finish(process, 60)
    assert code == 130, output
    check_stopped(run, output)
    assert (run / "tokenizer.json").is_file()
    tokens, bits = next(row for row in rows(run, "validation_loss", "bits_per_byte") if row[0])
    assert bits < tokens / math.log(2)  # a token is more than a byte


# ---- ranks of the pool


@pytest.mark.parametrize(("value", "save_every"), [("nan", 2), ("inf", 0)])
def test_loss_that_is_not_finite_stops_before_the_weights_change_and_the_run_goes_on_from_its_checkpoint(
    inputs: Path, whole_run: tuple[Path, str], ranks: Ranks, tmp_path: Path, value: str, save_every: int
) -> None:
    """Also where a kill has left half a line behind; without a checkpoint a launcher that restarts begins again."""
    run = tmp_path / "run"
    results = ranks(2, run_session, arguments(inputs, run, save_every=save_every), value, timeout=120)
    kept = "the last checkpoint is of step 2" if save_every else "nothing was saved yet"
    for result in results:
        # inf of one rank stays inf in the mean.
        assert re.search(rf"the loss is {value} at step 3;.* {kept}", result["raised"])
        assert result["changed"] is False
        assert result["calls"] == 9  # all micro-batches, no step
    assert [row[0] for row in rows(run, "step")] == [1, 2]
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    (code, told), _ = ranks(2, fails, arguments(inputs, run, resume="latest"), 0 if save_every else 3, timeout=120)
    assert code == 0, told
    assert (f"no checkpoint in {run} yet: starting from the beginning" in told) == (not save_every)
    assert curve(run) == curve(whole_run[0])


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
        assert not (tmp_path / "run" / "checkpoints").exists()  # said at the start, see `_tell`
        return
    for result in results:
        measured, planned = result["bytes"], result["planned"]
        assert measured["wavelet_moments"] == planned["wavelet"]
        assert measured["plain_moments"] == planned["rest"]
        assert measured["scalars"] == planned["scalars"]
    assert moments == 8 * units + sum(result["planned"]["cut"] for result in results)
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


@pytest.mark.parametrize(
    ("changes", "engine_changes", "message"),
    [
        ({"stepz": 3}, {}, "'--stepz' in the command line"),
        ({"corpus": "/nowhere"}, {}, "corpus '/nowhere': no such folder"),
        ({"model": "huge"}, {}, "no such configuration file: 'huge'"),
        ({"resume": "latest"}, {}, "no complete checkpoint in"),
        ({}, {"train_batch_size": 7}, "2 ranks = 12, but train_batch_size = 7"),
        ({}, {"gradient_cliping": 1}, "'gradient_cliping'"),
        ({}, optimizer(levels=2), "'levels'"),
        ({}, optimizer(level=17), "level"),
        ({}, optimizer(wavelet="haaar"), "haaar"),
        ({}, optimizer(recipe="secret"), "recipe"),
        ({}, optimizer(targets=["conv"]), "'conv' matches no weight matrix"),
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
