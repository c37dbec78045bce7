"""Runs of the recipe that go on: after a kill, on other ranks, in another folder; and those that must not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest

from gwt_dist.checkpoint import checkpoints
from pretrain_cases import (
    STEPS,
    Ranks,
    arguments,
    curve,
    engine,
    fails,
    finish,
    optimizer,
    rows,
    run_streamed,
    started,
    torchrun,
    wait_for,
)

Run = tuple[Path, str]


def kill_a_rank(launcher: int, number: int) -> None:
    """SIGKILL to one of the ranks that a torchrun has started."""
    ranks = [p for p in psutil.Process(launcher).children() if any("pretrain.py" in word for word in p.cmdline())]
    assert len(ranks) == 2
    ranks[number].kill()


def test_torchrun_starts_a_killed_run_again_and_it_goes_on(inputs: Path, whole_run: Run) -> None:
    """The same command line before there is any checkpoint and after; `test_faults.py` kills more often."""
    run = inputs / "elastic"
    with started([*torchrun(restarts=3), *arguments(inputs, run), "--resume"]) as process:
        wait_for(run / "checkpoints" / "latest", process)
        kill_a_rank(process.pid, 0)
        code, output = finish(process)
    assert code == 0, output
    assert f"no checkpoint in {run} yet: starting from the beginning" in output
    assert curve(run) == curve(whole_run[0])
    assert (run / "summary.json").exists()


@pytest.mark.parametrize("world_size", [1, 3])
def test_other_ranks_take_the_same_batches(
    inputs: Path, whole_run: Run, ranks: Ranks, tmp_path: Path, world_size: int
) -> None:
    run, whole = tmp_path / "run", whole_run[0]
    resume = whole / "checkpoints" / "step-00000007"
    argv = arguments(inputs, run, resume=resume, save_every=4, keep=1)
    (code, output), *_ = ranks(world_size, fails, argv, timeout=120)
    assert code == 0, output
    assert f"{world_size} ranks go on where 2 saved: micro batch 2, accumulation {6 // world_size}" in output
    keys = ("step", "batch", "tokens", "lr")
    assert rows(run, *keys) == rows(whole, *keys)
    for key in ("loss", "validation_loss"):
        found, expected = ([value for (value,) in rows(one, key) if value is not None] for one in (run, whole))
        assert found == pytest.approx(expected, rel=1e-5)
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-00000012"]


def test_streamed_run_goes_on_in_another_folder_with_the_same_curve(
    inputs: Path, ranks: Ranks, torch_extensions_dir: Path, tmp_path: Path
) -> None:
    changes = {"corpus": "some/dataset", "steps": 6, "save_every": 3, "shuffle_buffer": 20}
    files = str(inputs / "text" / "*.txt")
    whole, branch = tmp_path / "whole", tmp_path / "branch"
    ranks(2, run_streamed, arguments(inputs, whole, **changes), files, timeout=120)
    changes["resume"] = whole / "checkpoints" / "step-00000003"
    ranks(2, run_streamed, arguments(inputs, branch, **changes), files, timeout=120)
    assert len(curve(whole)) == 7  # six steps and a validation
    assert curve(branch) == curve(whole)
    alone = arguments(inputs, tmp_path / "alone", **changes)
    refused = ranks(1, run_streamed, alone, files, timeout=120)[0]["refused"]
    assert "each of 2 ranks its share, so 1 ranks cannot go on" in refused
    assert not (tmp_path / "alone").exists()


def test_damage_is_named_and_the_checkpoint_before_goes_on(
    inputs: Path, whole_run: Run, ranks: Ranks, tmp_path: Path
) -> None:
    run, branch = tmp_path / "run", tmp_path / "branch"
    shutil.copytree(whole_run[0], run)
    path = run / "checkpoints" / "step-00000012" / "rank-00001.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    for resume in ("latest", str(path.parent)):
        (code, error), _ = ranks(2, fails, arguments(inputs, run, resume=resume, steps=20), timeout=120)
        assert (code, error.count("\n")) == (2, 1)
        assert f"{path} is damaged: bytes" in error
    earlier = run / "checkpoints" / "step-00000007"
    (code, error), _ = ranks(2, fails, arguments(inputs, run, resume=earlier), timeout=120)
    assert code == 2 and "would overwrite the later checkpoint" in error
    results = ranks(2, fails, arguments(inputs, branch, resume=earlier), timeout=120)
    assert [code for code, _ in results] == [0, 0], results
    assert curve(branch) == curve(whole_run[0])


def test_a_save_that_fails_ends_the_run_in_one_line(inputs: Path, ranks: Ranks, whole_run: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(whole_run[0] / "run.json", run)
    (run / "checkpoints" / ".step-00000004.saving").touch()  # no folder, so it cannot be cleared
    (code, error), _ = ranks(2, fails, arguments(inputs, run, resume="latest"), 1, timeout=120)
    assert code == 4, error
    assert "error: rank 0: " in error and ".step-00000004.saving: Not a directory" in error
    assert not checkpoints(run / "checkpoints")


def test_a_restart_at_the_end_is_done(inputs: Path, whole_run: Run, ranks: Ranks) -> None:
    """A rank that dies after the last checkpoint makes the launcher start all again."""
    argv = arguments(inputs, whole_run[0], resume="latest")
    (code, told), _ = ranks(2, fails, argv, 3, timeout=120)
    assert code == 0 and "all 12 steps are done" in told
    (code, told), _ = ranks(2, fails, argv, timeout=120)
    assert code == 2 and "at step 12 already; raise steps" in told


@pytest.mark.parametrize(
    ("changes", "engine_changes", "message"),
    [
        ({}, optimizer(level=3), "optimizer.level is 3 in this run and 2 in"),
        ({}, optimizer(wavelet="db2"), "optimizer.wavelet is 'db2' in this run and 'haar' in"),
        ({}, optimizer(recipe="energy"), "optimizer.recipe is 'energy' in this run and 'paper'"),
        ({}, {"bf16": {"enabled": True}}, "precision is 'bf16' in this run and 'fp32' in"),
        ({}, {"gradient_accumulation_steps": 4}, "train_batch_size is 16 in this run and 12 in"),
        ({}, {"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}, "checkpoints are of GWTAdamW"),
        ({"sequence_length": 16}, {}, "sequence_length is 16 in this run and 32 in"),
        ({"seed": 1}, {}, "seed is 1 in this run and 0 in"),
        ({"tokenizer": "bpe:300"}, {}, "tokenizer is 'bpe:300' in this run and 'bytes' in"),
        ({"model": "tiny"}, {}, r"model.hidden_size is 192 in this run and 32 in"),
        ({"corpus": "{inputs}/text/0*.txt"}, {}, "corpus.sha256 is"),
        ({"resume": "nowhere"}, {}, "no complete checkpoint in nowhere"),
        ({"resume": ""}, {}, "is not empty and nothing in it is overwritten"),
    ],
)
def test_resume_of_another_run_is_refused(
    inputs: Path,
    whole_run: Run,
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


def test_another_zero_stage_goes_on(inputs: Path, whole_run: Run, ranks: Ranks, tmp_path: Path) -> None:
    whole, settings = whole_run[0], engine(tmp_path, "zero3", zero_optimization={"stage": 3})
    run, resume = tmp_path / "run", whole / "checkpoints" / "step-00000007"
    argv = arguments(inputs, run, deepspeed_config=settings, resume=resume)
    assert [code for code, _ in ranks(2, fails, argv, timeout=120)] == [0, 0]
    assert rows(run, "step", "batch", "lr") == rows(whole, "step", "batch", "lr")
    assert rows(run, "loss")[-2][0] == pytest.approx(rows(whole, "loss")[-2][0], rel=1e-5)
    assert rows(run, "loss")[-2][0] is not None and len(rows(run, "step")) == STEPS + 2
